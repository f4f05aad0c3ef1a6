"""Sums and copies along groupings on GPUs: the kernels of kernels.c in Triton, each with one launch and one pass.

A kernel is compiled for one grouping, whose pieces are constants in its code. All sums are in float32, in a fixed
order, and rounded once. Row offsets have 64 bits. Block sizes come from a formula and are never tuned, so the same
shape is always computed in the same way.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from relora_mora.kernels import reference
from relora_mora.kernels.cuda import MOST_PIECES
from relora_mora.kernels.grouping import Grouping, Piece, as_rows
from relora_mora.kernels.triton_launch import launch, power_of_two, works_on

_BLOCK = 256  # slots or features
_ELEMENTS = 2048  # elements that a program reads at once: 16 for each of its 128 threads
_MIN_ROWS = 4  # gives each thread 16 bytes to store
_NEIGHBOURS = 4  # adjacent features of a slot that are read at once


@triton.jit
def _sum_piece(
    x,
    first,
    valid,
    FEATURE: tl.constexpr,
    SLOT: tl.constexpr,
    SLOTS: tl.constexpr,
    REPEATS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece's sums [ROWS, BLOCK] for the slots from ``first`` on; x points to rows [ROWS, 1].

    Adjacent features are read [ROWS, BLOCK * TOGETHER] in memory order.
    """
    element = ((first - SLOT) * TOGETHER + tl.arange(0, BLOCK * TOGETHER))[None, :]
    inside = valid & (element >= 0) & (element < SLOTS * TOGETHER)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, REPEATS, TOGETHER):
        if NEIGHBOURS and REPEATS != TOGETHER:
            repeat = start + element % TOGETHER
            offset = element // TOGETHER * REPEATS + repeat
            part = tl.load(x + (FEATURE + offset), mask=inside & (repeat < REPEATS), other=0.0)
        else:
            part = tl.load(x + (FEATURE + start * SLOTS + element), mask=inside, other=0.0)
        total += tl.sum(tl.reshape(part.to(tl.float32), [ROWS, BLOCK, TOGETHER]), 2)
    return total


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(
    x,
    y,
    rows,
    x_stride: tl.constexpr,
    slots: tl.constexpr,
    pieces: tl.constexpr,
    n_pieces: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums y [rows, slots] of x [rows, features]"""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    first = tl.program_id(1) * BLOCK
    valid = row < rows
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range(n_pieces):
        total += _sum_piece(
            x + row * x_stride,
            first,
            valid,
            pieces[i * 6],
            pieces[i * 6 + 1],
            pieces[i * 6 + 2],
            pieces[i * 6 + 3],
            pieces[i * 6 + 4],
            pieces[i * 6 + 5],
            ROWS,
            BLOCK,
        )
    slot = (first + tl.arange(0, BLOCK))[None, :]
    tl.store(y + row * slots + slot, total.to(y.dtype.element_ty), mask=valid & (slot < slots))


@triton.jit
def _slot_of(
    feature,
    FEATURE: tl.constexpr,
    SLOT: tl.constexpr,
    SLOTS: tl.constexpr,
    REPEATS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """The slot of each feature in one piece, and whether the feature is in the piece."""
    offset = feature - FEATURE
    inside = (offset >= 0) & (offset < SLOTS * REPEATS)
    return SLOT + (offset // REPEATS if NEIGHBOURS else offset % SLOTS), inside


@triton.jit
def _add_kernel(
    weight,
    square,
    result,
    outputs: tl.constexpr,
    inputs: tl.constexpr,
    weight_stride: tl.constexpr,
    square_stride: tl.constexpr,
    out_pieces: tl.constexpr,
    n_out: tl.constexpr,
    in_pieces: tl.constexpr,
    n_in: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result [outputs, inputs] = weight + D square C"""
    output = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    feature = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    valid = (output < outputs) & (feature < inputs)
    row = tl.zeros([ROWS, 1], tl.int32)
    for i in tl.static_range(n_out):
        slot, inside = _slot_of(
            output,
            out_pieces[i * 6],
            out_pieces[i * 6 + 1],
            out_pieces[i * 6 + 2],
            out_pieces[i * 6 + 3],
            out_pieces[i * 6 + 4],
        )
        row = tl.where(inside, slot, row)
    wide = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range(n_in):
        slot, inside = _slot_of(
            feature,
            in_pieces[i * 6],
            in_pieces[i * 6 + 1],
            in_pieces[i * 6 + 2],
            in_pieces[i * 6 + 3],
            in_pieces[i * 6 + 4],
        )
        wide += tl.load(square + (row * square_stride + slot), mask=valid & inside, other=0.0).to(tl.float32)
    output = output.to(tl.int64)
    total = tl.load(weight + output * weight_stride + feature, mask=valid, other=0.0).to(tl.float32) + wide
    tl.store(result + output * inputs + feature, total.to(result.dtype.element_ty), mask=valid)


def group_sum(x: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    """x [..., features] -> [..., slots]"""
    if not works_on(x.device) or len(grouping.pieces) > MOST_PIECES:
        return grouping.sum(x)
    y = torch.empty(*x.shape[:-1], grouping.slots, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = as_rows(x)
    constants, n_rows, blocks = _sum_constants(grouping, x.stride(0))
    launch(_sum_kernel, (-(-len(x) // n_rows), blocks, 1), (x, y), (len(x),), constants)
    return y


def expand_add(weight: torch.Tensor, square: torch.Tensor, inputs: Grouping, outputs: Grouping) -> torch.Tensor:
    """weight [out, in] + D square C [out, in]; ``outputs.once`` must hold"""
    if not works_on(weight.device) or max(len(inputs.pieces), len(outputs.pieces)) > MOST_PIECES:
        return reference.expand_add(weight, square, inputs, outputs)
    assert outputs.once
    weight = as_rows(weight)
    square = as_rows(square)
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    constants, grid = _add_constants(inputs, outputs, weight.stride(0), square.stride(0))
    launch(_add_kernel, grid, (weight, square, result), (), constants)
    return result


@functools.lru_cache(maxsize=4096)
def _sum_constants(grouping: Grouping, x_stride: int) -> tuple[dict[str, Any], int, int]:
    """The kernel's constants, the rows per program, and the programs per row."""
    block = min(_BLOCK, power_of_two(grouping.slots))
    n_rows = max(_MIN_ROWS, _ELEMENTS // (block * max(map(_together, grouping.pieces))))
    constants = {
        "x_stride": x_stride,
        "slots": grouping.slots,
        "pieces": _flat(grouping),
        "n_pieces": len(grouping.pieces),
        "ROWS": n_rows,
        "BLOCK": block,
    }
    return constants, n_rows, -(-grouping.slots // block)


@functools.lru_cache(maxsize=4096)
def _add_constants(
    inputs: Grouping, outputs: Grouping, weight_stride: int, square_stride: int
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """The kernel's constants and its grid."""
    block = min(_BLOCK, power_of_two(inputs.features))
    n_rows = _ELEMENTS // block
    constants = {
        "outputs": outputs.features,
        "inputs": inputs.features,
        "weight_stride": weight_stride,
        "square_stride": square_stride,
        "out_pieces": _flat(outputs),
        "n_out": len(outputs.pieces),
        "in_pieces": _flat(inputs),
        "n_in": len(inputs.pieces),
        "ROWS": n_rows,
        "BLOCK": block,
    }
    return constants, (-(-outputs.features // n_rows), -(-inputs.features // block), 1)


def _flat(grouping: Grouping) -> tuple[int, ...]:
    """The numbers of each piece, followed by how many features of a slot are read at once."""
    return tuple(number for piece in grouping.pieces for number in (*map(int, piece), _together(piece)))


def _together(piece: Piece) -> int:
    return power_of_two(min(piece.repeats, _NEIGHBOURS)) if piece.neighbours else 1
