"""The interfaces of optimizers that step whole matrices, and the state that they keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

COUNT = "updates"  # the state tensor that counts a matrix's steps; it is in host memory, because the host reads it
_CODES = {"exp_avg_codes": torch.int8, "exp_avg_sq_codes": torch.uint8}


def state_dtype(key: str) -> torch.dtype:
    """The type of a state tensor: float32, unless it has codes of 8 bits."""
    return _CODES.get(key, torch.float32)


@dataclass(frozen=True)
class MatrixState:
    """A rule's state of one whole matrix, on the rank that updates it. It is zero at first and after a reset.

    ``seed`` belongs to the matrix and determines the rule's random draws.
    """

    seed: int
    tensors: dict[str, Tensor]


def new_state(seed: int, shapes: Mapping[str, tuple[int, ...]], device: torch.device | str = "cpu") -> MatrixState:
    """The initial state with the ``shapes`` that :meth:`MatrixRule.state_shapes` returns."""
    return MatrixState(
        seed,
        {
            key: torch.zeros(shape, dtype=state_dtype(key), device="cpu" if key == COUNT else device)
            for key, shape in shapes.items()
        },
    )


class Unit(NamedTuple):
    """The matrices that a rule updates together, by name: one, or LoRA's A and B with ``product_scale`` B A."""

    names: tuple[str, ...]
    product_scale: float = 1.0


class MatrixRule(Protocol):
    """The interface of the class that ``MatrixOptimizer.rule`` names.

    A step has two parts, because ZeRO concatenates parameters and cuts them anywhere. The element-wise part runs where
    the elements are. Only its result is assembled into whole matrices for the second part.
    """

    def update_moments(self, gradient: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Updates the moments element by element, and turns the gradient into the input of :meth:`update` in place."""

    def update(self, matrices: Tensor, states: Sequence[MatrixState]) -> Tensor:
        """Whole matrices [k, m, n] after :meth:`update_moments` -> the update [k, m, n] to subtract at a rate of 1.

        Changes ``states``, the states of these matrices, and may overwrite the matrices.
        """

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The shapes in a matrix's :class:`MatrixState`, whose types :func:`state_dtype` knows.

        Empty for a rule that needs only its moments.
        """

    def flops(self, rows: int, columns: int) -> float:
        """FLOPs of :meth:`update` for one matrix."""

    def workspace_bytes(self, rows: int, columns: int, *, on_gpu: bool) -> int:
        """Bytes that :meth:`update` needs in addition to one matrix."""


@runtime_checkable
class PairRule(Protocol):
    """The interface of a rule that updates A [r, in] and B [out, r] of a LoRA layer together.

    It sees their values too, which ZeRO sends to the owner along with what :meth:`update_moments` leaves. Weight decay
    lambda at a rate eta multiplies A and B by s = sqrt(1 - eta lambda) and divides their updates by s, so that the
    product B A decays by 1 - eta lambda, and its update does not.
    """

    def update_moments(self, gradient: Tensor, moments: Mapping[str, Tensor]) -> None:
        """As for :class:`MatrixRule`."""

    def update_pairs(
        self, steps: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], scale: float, rate: float
    ) -> tuple[Tensor, Tensor]:
        """Updates A and B of k layers of one shape, whose delta is ``scale`` B A.

        ``steps`` are A's [k, r, in] and B's [k, out, r] after :meth:`update_moments`, and ``values`` their current
        values. Returns the updates to subtract times ``rate``.
        """

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """As for :class:`MatrixRule`."""

    def flops(self, lora_rank: int, in_features: int, out_features: int) -> float:
        """FLOPs of :meth:`update_pairs` for one pair."""

    def workspace_bytes(self, lora_rank: int, in_features: int, out_features: int, *, on_gpu: bool) -> int:
        """Bytes that :meth:`update_pairs` needs in addition to its arguments, for one pair."""


Rule = MatrixRule | PairRule
