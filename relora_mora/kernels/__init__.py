"""Sums and copies along groupings, and cross-entropy over logits, in one pass over memory each.

On CPUs in float32 and bfloat16 by kernels.c, where it was compiled; everywhere else, and while autograd records or
torch.compile traces, by torch. Same results up to rounding: the compiled kernels add up bfloat16 in float32 and round
once, torch rounds after every piece of a grouping (see tests/test_kernels.py).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from relora_mora.kernels import compiled
from relora_mora.kernels.compiled import disabled
from relora_mora.kernels.grouping import Grouping, Piece, contiguous, interleaved, wrapped_interleaved

__all__ = [
    "Grouping",
    "Piece",
    "available",
    "contiguous",
    "cross_entropy_",
    "describe",
    "disabled",
    "expand_add",
    "group_sum",
    "interleaved",
    "takes_logits",
    "wrapped_interleaved",
]


def available() -> bool:
    """Whether the compiled kernels are there."""
    return isinstance(compiled.load(), ctypes.CDLL)


def describe() -> str:
    """The instruction set of the compiled kernels, or why torch takes their place."""
    library = compiled.load()
    return (
        f"compiled, {library.remora_use(compiled.BEST).decode()}"
        if isinstance(library, ctypes.CDLL)
        else f"torch: {library}"
    )


def group_sum(x: Tensor, grouping: Grouping) -> Tensor:
    """x [..., features] -> [..., slots], the sum of each slot's features; differentiable."""
    return compiled.group_sum(x, grouping) if compiled.takes(x) else grouping.sum(x)


def expand_add(weight: Tensor, square: Tensor, inputs: Grouping, outputs: Grouping) -> Tensor:
    """weight [out, in] + D square C, with square [R, R], C = ``inputs.sum`` and D = ``outputs.copy``; not differentiable.

    In torch a piece of the outputs times a piece of the inputs is one strided addition.
    """
    if torch.compiler.is_compiling():
        return weight + outputs.copy(inputs.copy(square).mT).mT  # one kernel in the end, and no outputs that are views
    if outputs.once and compiled.takes(weight, square):
        return compiled.expand_add(weight, square, inputs, outputs)
    result = torch.empty_like(weight)
    with torch.no_grad():
        for down in outputs.pieces:
            end = 0
            for across in inputs.pieces:
                source = weight if across.feature >= end else result  # a feature's second slot adds to the first
                end = max(end, across.columns.stop)
                _add_piece(source, square[down.places, across.places], result, down, across)
    return result


def takes_logits(logits: Tensor) -> bool:
    """Whether :func:`cross_entropy_` works on such logits in place, without a copy in float32."""
    return compiled.takes(logits)


def cross_entropy_(
    logits: Tensor, labels: Tensor, *, ignore: int, scale: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum of the negative log-likelihoods of labels [N] under logits [N, V], a float32 scalar, and its gradient [N, V] times ``scale``.

    Labels that are ``ignore`` (a negative number) are not scored. Overwrites the logits; the gradient (None unless asked
    for) has their dtype. All arithmetic is in float32.
    """
    if compiled.takes(logits):
        if int(labels.max()) >= logits.shape[1] or bool(((labels < 0) & (labels != ignore)).any()):
            raise IndexError(
                f"labels go from {int(labels.min())} to {int(labels.max())}, the vocabulary has {logits.shape[1]}"
            )
        losses = compiled.cross_entropy(logits, labels, float(scale), gradient=gradient)
        return losses.sum(), logits if gradient else None
    wide = logits.float()
    log_sum = wide.logsumexp(-1, keepdim=True)
    keep = (labels != ignore).unsqueeze(-1)
    index = labels.clamp(min=0).unsqueeze(-1)
    loss = ((log_sum - wide.gather(-1, index)) * keep).sum()
    if not gradient:
        return loss, None
    probabilities = wide.sub_(log_sum).exp_()
    probabilities.scatter_add_(-1, index, torch.full_like(log_sum, -1.0))
    return loss, probabilities.mul_(keep * scale).to(logits.dtype)


def _add_piece(source: Tensor, square: Tensor, result: Tensor, down: Piece, across: Piece) -> None:
    def cut(matrix: Tensor) -> Tensor:
        return down.by_slot(across.by_slot(matrix, 1)[0], 0)[
            0
        ]  # [slots, repeats | repeats, slots] of outputs, then of inputs

    square = square.unsqueeze(1 if down.neighbours else 0).unsqueeze(3 if across.neighbours else 2)
    torch.add(cut(source), square, out=cut(result))
