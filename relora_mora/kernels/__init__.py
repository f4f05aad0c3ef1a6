"""Sums and copies along groupings, in one pass over memory each.

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
    "describe",
    "disabled",
    "expand_add",
    "group_sum",
    "interleaved",
    "wrapped_interleaved",
]


def available() -> bool:
    """Whether the compiled kernels are there."""
    return isinstance(compiled.load(), ctypes.CDLL)


def describe() -> str:
    """The instruction set of the compiled kernels, or why torch takes their place."""
    library = compiled.load()
    return f"compiled, {library.remora_use(compiled.BEST).decode()}" if isinstance(library, ctypes.CDLL) else f"torch: {library}"


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


def _add_piece(source: Tensor, square: Tensor, result: Tensor, down: Piece, across: Piece) -> None:
    def cut(matrix: Tensor) -> Tensor:
        return down.by_slot(across.by_slot(matrix, 1)[0], 0)[0]  # [slots, repeats | repeats, slots] of outputs, then of inputs

    square = square.unsqueeze(1 if down.neighbours else 0).unsqueeze(3 if across.neighbours else 2)
    torch.add(cut(source), square, out=cut(result))
