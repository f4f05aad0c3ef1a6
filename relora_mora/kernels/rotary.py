"""A weight plus MoRA's rotary operator (``operators.RotaryOperator``), in torch operations on every device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

ROPE_BASE = 10000.0


def blocks_of(in_features: int, out_features: int, size: int) -> int:
    """B, how many blocks of R inputs are rotated: those that outputs are made of."""
    return -(-min(in_features, out_features) // size)


def angles(blocks: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [B, R] of block j and feature i, halves paired; computed in float32"""
    # torch's compiler looks through a cache, and from 2.15 on warns of it
    tables = _tables.__wrapped__ if torch.compiler.is_compiling() else _tables
    return tables(blocks, size, dtype, device)


@lru_cache(maxsize=256)
def _tables(blocks: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    inverse = 1.0 / (ROPE_BASE ** (torch.arange(0, size, 2).float() / size))
    table = torch.outer(torch.arange(blocks).float(), inverse)
    table = torch.cat([table, table], -1)
    return table.cos().to(device, dtype), table.sin().to(device, dtype)


def add_blocks(total: Tensor, square: Tensor) -> Tensor:
    """Adds ``square Rot_j`` to total [out, in], in place, wherever block j of the inputs meets its outputs."""
    outputs, inputs = total.shape
    size = square.shape[0]
    blocks = blocks_of(inputs, outputs, size)
    cos, sin = (table.unsqueeze(-2) for table in angles(blocks, size, square.dtype, square.device))  # [B, 1, R]
    # the transpose of the rotation acts on the rows of the square
    left, right = (square * sin).chunk(2, -1)
    rotated = square * cos + torch.cat([right, -left], -1)  # [B, R, R]
    for row in range(0, outputs, size):
        j = row // size % blocks
        block = rotated[j, : outputs - row]
        column = j * size
        while column < (j + 1) * size:
            feature = column % inputs  # columns beyond the last feature wrap
            width = min(inputs - feature, (j + 1) * size - column)
            total[row : row + size, feature : feature + width] += block[:, column - j * size :][:, :width]
            column += width
    return total


def rotary_add(weight: Tensor, square: Tensor, after: Tensor | None = None) -> Tensor:
    """Nothing is read from ``after``, see ``ops.expand_add``."""
    return add_blocks(weight.clone(memory_format=torch.contiguous_format), square)
