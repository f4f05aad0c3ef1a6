"""The interface of optimizers that step whole matrices, and the state that they keep.

:class:`MatrixRule` is for outsiders, too: ``optim.matrices=FILE.py:NAME`` trains with a rule of one's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relora_mora.system.seeds import derived_seed

COUNT = "updates"  # this state tensor is in host memory, so that reading it does not make the host wait for a GPU
_CODES = {"exp_avg_codes": torch.int8, "exp_avg_sq_codes": torch.uint8}
_OF_CHECKPOINTS = ("master", "base")  # what a checkpoint calls the values of a matrix


def state_dtype(key: str) -> torch.dtype:
    """The type of a state tensor: float32, unless it has codes of 8 bits."""
    return _CODES.get(key, torch.float32)


class MatrixState(dict[str, Tensor]):
    """The tensors that a rule keeps of one matrix, by name. They are zero at first and after a reset.

    Change them in place, or assign: ``state["average"] = value`` copies the value into the tensor. All are float32 on
    the device of the matrix, except that one with the name ``updates`` is in host memory, for a count that the rule
    reads with ``int()``.

    ``seed`` belongs to the matrix, and ``shapes`` are those that :func:`shapes_of` returns.
    """

    def __init__(self, seed: int, shapes: Mapping[str, tuple[int, ...]], device: torch.device | str = "cpu") -> None:
        self.seed = seed
        for key, shape in shapes.items():
            where = "cpu" if key == COUNT else device
            super().__setitem__(key, torch.zeros(shape, dtype=state_dtype(key), device=where))

    def __setitem__(self, name: str, value: Tensor) -> None:
        kept = self[name]
        if value.shape != kept.shape:
            raise ValueError(f"the state {name} has the shape {list(kept.shape)}, got {list(value.shape)}")
        kept.copy_(value)

    def generator(self, number: int, device: torch.device | str = "cpu") -> torch.Generator:
        """For random draws, which depend on ``train.seed``, the matrix's name and this number only.

        With a number that follows from the state, such as a count of updates, a resume draws the same.
        """
        return torch.Generator(device).manual_seed(derived_seed(self.seed, number))


class MatrixRule(ABC):
    """An optimizer of matrices. Subclass it, and train with ``optim.matrices=FILE.py:NAME`` or ``package.module:NAME``.

    **Settings** are the arguments of the constructor: ``optim.rule: {rank: 64}`` makes ``NAME(rank=64)``. Unknown names
    are refused, values are converted to the annotated types, and the constructor may raise ValueError.

    **Matrices.** Every step calls :meth:`update` for each matrix that the rule trains: the decoder's linears [out, in],
    or their adapters (the square of MoRA [R, R], LoRA's A [r, in] and B [out, r]). The gradient is whole, however ZeRO
    has cut it, averaged over the batch, and clipped. One rank updates a matrix; at stage 0 every rank updates all, so
    the same gradient and state must give the same bits. Rates, weight decay and norms are not the rule's concern.

    **State.** All that a rule remembers of a matrix is in its :class:`MatrixState`. Checkpoints, moves to other ranks
    and stages, and merges, which reset the state of adapters, follow from :meth:`state_shapes`. An object of the rule
    must not remember anything itself: it is made anew at a resume, and has all matrices of a rank.

    **Random numbers** come from :meth:`MatrixState.generator`.

    For example, momentum whose update has a root mean square of 1::

        class Normalized(MatrixRule):
            def __init__(self, momentum: float = 0.9) -> None:
                self.momentum = momentum

            def state_shapes(self, rows, columns):
                return {"average": (rows, columns)}

            def update(self, gradient, state):
                average = state["average"].lerp_(gradient, 1 - self.momentum)
                return average / average.square().mean().sqrt().clamp(min=1e-12)
    """

    is_slow = False  # whether a step may take minutes; the watchdog then waits that long

    @abstractmethod
    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in the state of a matrix [rows, columns], by name; () for a number."""

    @abstractmethod
    def update(self, gradient: Tensor, state: MatrixState) -> Tensor:
        """What to subtract from a matrix at a rate of 1, given its gradient; both [m, n], float32.

        Changes the state. It may overwrite the gradient and return it.
        """

    def flops(self, rows: int, columns: int) -> float:
        """For ``relora-mora plan``: FLOPs of :meth:`update` for one matrix."""
        return 0.0

    def workspace_bytes(self, rows: int, columns: int, *, on_gpu: bool) -> int:
        """For ``relora-mora plan``: bytes that :meth:`update` needs in addition to one gradient."""
        return 0

    # ---- for the rules of the package ---------------------------------------------------------------------------

    def update_moments(self, gradient: Tensor, moments: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Updates the moments, and turns the gradient into the input of :meth:`update` in place, element by element.

        It runs where the elements are, before they are assembled. Only the package's own rules have moments: the
        registry names them (``relora_mora/config/registry.py``).
        """

    def update_stack(self, gradients: Tensor, states: Sequence[MatrixState]) -> Tensor:
        """:meth:`update` for several matrices of one shape [k, m, n], which may be overwritten."""
        for gradient, state in zip(gradients, states, strict=True):
            update = self.update(gradient, state)
            if update.shape != gradient.shape:
                raise ValueError(
                    f"optim.matrices: {type(self).__name__}.update returned the shape {list(update.shape)} for a "
                    f"gradient {list(gradient.shape)}; return an update of the same shape"
                )
            gradient.copy_(update)
        return gradients


def shapes_of(rule: MatrixRule, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The rule's :meth:`MatrixRule.state_shapes`; raises ValueError if a checkpoint cannot have them."""
    shapes = rule.state_shapes(rows, columns)
    for key, shape in shapes.items():
        is_name = isinstance(key, str) and key.isidentifier() and key not in _OF_CHECKPOINTS
        if not is_name or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(
                f"optim.matrices: {type(rule).__name__}.state_shapes({rows}, {columns}) has {key!r}: {shape!r}; give "
                f"names such as 'average' (not {' or '.join(_OF_CHECKPOINTS)}), each with a tuple of whole numbers"
            )
    return shapes
