"""How matrices step where that is no function of single elements: what a rule does and keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

COUNT = "updates"  # the tensor of a state that counts its matrix's steps; in host memory


@dataclass(frozen=True)
class MatrixState:
    """What a rule keeps of one whole matrix, on the rank that updates it: float32, zeros at first and after a reset.

    ``seed`` is the matrix's own, for what the rule draws.
    """

    seed: int
    tensors: dict[str, Tensor]


class MatrixRule(Protocol):
    """What ``MatrixOptimizer.rule`` makes.

    A step is cut in two, for ZeRO lays parameters end to end and cuts them anywhere: what goes element by element is
    done where the elements are, and only its result is put together to whole matrices.
    """

    def update_moments(self, gradient: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Element by element, all of one shape: updates the moments, and makes of the gradient what is to be whole."""

    def update(self, matrices: Tensor, states: Sequence[MatrixState]) -> Tensor:
        """[k, m, n], whole matrices after :meth:`update_moments`, as they are -> [k, m, n], what a rate of 1 subtracts.

        ``states`` are theirs, and change. The matrices may be overwritten.
        """

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The shapes in a matrix's :class:`MatrixState`; none for a rule whose moments are all it needs."""

    def flops(self, rows: int, columns: int) -> float:
        """FLOPs of :meth:`update` for one matrix."""

    def workspace_bytes(self, rows: int, columns: int, *, on_gpu: bool) -> int:
        """Bytes that :meth:`update` needs beside one matrix."""
