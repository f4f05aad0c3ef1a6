"""Both ends of a product in 8 bits on GPUs: rows to 8-bit values with a scale, and int32 sums back, as in kernels.c.

A program quantizes one row, which it reads once. A row with a number that is not finite gets such a scale: the largest
is found among the bits of positive numbers, where NaN is above infinity.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from relora_mora.kernels import reference
from relora_mora.kernels.cuda import MOST_PIECES
from relora_mora.kernels.grouping import Grouping, as_rows
from relora_mora.kernels.triton_groups import _flat, _slot_of
from relora_mora.kernels.triton_launch import launch, power_of_two, works_on

_LONGEST = 16384  # elements of a row that a program keeps: at most 32 for each of its threads
_TOGETHER = 512  # longer rows that torch operations quantize at a time, because they need float32 copies
_ELEMENTS = 2048  # elements that a program scales
_BLOCK = 256  # features
_SMALLEST = reference.SMALLEST_SCALE
_ROUNDS = 12582912.0  # 1.5 * 2^23: adding it to a small number leaves a whole one in the low bits


@triton.jit
def _quantize_kernel(
    x,
    columns,
    values,
    scales,
    features: tl.constexpr,
    padded: tl.constexpr,
    x_stride: tl.constexpr,
    has_columns: tl.constexpr,
    largest: tl.constexpr,
    smallest: tl.constexpr,
    rounds: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values [rows, padded], scales [rows] of x [rows, features] times columns [features]"""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    wide = tl.load(x + row * x_stride + feature, mask=feature < features, other=0.0).to(tl.float32)
    if has_columns:
        wide *= tl.load(columns + feature, mask=feature < features, other=0.0)
    bits = wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(bits, 0).to(tl.float32, bitcast=True) / largest
    scale = tl.where(scale < smallest, smallest, scale)
    wide *= 1.0 / scale
    if values.dtype.element_ty == tl.int8:
        rounded = (wide + rounds).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        rounded = wide.to(values.dtype.element_ty)
    tl.store(values + row * padded + feature, rounded, mask=feature < padded)
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["n"])
def _scale_kernel(
    sums,
    rows,
    columns,
    slots_of,
    y,
    n,
    features: tl.constexpr,
    sums_stride: tl.constexpr,
    slots_stride: tl.constexpr,
    has_columns: tl.constexpr,
    pieces: tl.constexpr,
    n_pieces: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y [n, features] = sums rows columns + the copies of slots_of [n, slots], if there are pieces"""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    feature = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    valid = (row < n) & (feature < features)
    total = tl.load(sums + row * sums_stride + feature, mask=valid, other=0).to(tl.float32)
    total *= tl.load(rows + row, mask=row < n, other=0.0)
    if has_columns:
        total *= tl.load(columns + feature, mask=feature < features, other=0.0)
    for i in tl.static_range(n_pieces):
        slot, inside = _slot_of(
            feature,
            pieces[i * 6],
            pieces[i * 6 + 1],
            pieces[i * 6 + 2],
            pieces[i * 6 + 3],
            pieces[i * 6 + 4],
        )
        total += tl.load(slots_of + (row * slots_stride + slot), mask=valid & inside, other=0.0).to(tl.float32)
    tl.store(y + row * features + feature, total.to(y.dtype.element_ty), mask=valid)


def quantize_rows(x: Tensor, kind: torch.dtype, columns: Tensor | None, padded: int) -> tuple[Tensor, Tensor]:
    """x [n, features], columns [features] -> values [n, padded], scales [n]"""
    if not works_on(x.device) or padded > _LONGEST or (kind is not torch.int8 and not _converts(x.device)):
        parts = [reference.quantize_rows(rows, kind, columns, padded) for rows in x.split(_TOGETHER)]
        return torch.cat([values for values, _ in parts]), torch.cat([scales for _, scales in parts])
    x = as_rows(x)
    n, features = x.shape
    values = torch.empty(n, padded, dtype=kind, device=x.device)
    scales = torch.empty(n, dtype=torch.float32, device=x.device)
    if n:
        block = power_of_two(padded)
        constants = {
            "features": features,
            "padded": padded,
            "x_stride": x.stride(0),
            "has_columns": columns is not None,
            "largest": reference.LARGEST[kind],
            "smallest": _SMALLEST,
            "rounds": _ROUNDS,
            "BLOCK": block,
        }
        factors = scales if columns is None else columns
        launch(_quantize_kernel, (n, 1, 1), (x, factors, values, scales), (), constants, warps=max(8, block // 1024))
    return values, scales


def scale_rows(
    sums: Tensor, rows: Tensor, columns: Tensor | None, slots_of: Tensor | None, grouping: Grouping, dtype: torch.dtype
) -> Tensor:
    """sums int32 [n, >= features], rows [n], columns [features], slots_of [n, slots] -> [n, features]"""
    if not works_on(sums.device) or (slots_of is not None and len(grouping.pieces) > MOST_PIECES):
        return reference.scale_rows(sums, rows, columns, dtype, grouping, slots_of)
    n = len(sums)
    y = torch.empty(n, grouping.features, dtype=dtype, device=sums.device)
    if n:
        added = None if slots_of is None else as_rows(slots_of)
        constants, n_rows, blocks = _scale_constants(
            grouping, sums.stride(0), None if added is None else added.stride(0), columns is not None
        )
        tensors = (sums, rows, rows if columns is None else columns, rows if added is None else added, y)
        launch(_scale_kernel, (-(-n // n_rows), blocks, 1), tensors, (n,), constants)
    return y


@functools.lru_cache(maxsize=4096)
def _scale_constants(
    grouping: Grouping, sums_stride: int, slots_stride: int | None, has_columns: bool
) -> tuple[dict[str, Any], int, int]:
    """The kernel's constants, the rows per program, and the programs per row."""
    block = min(_BLOCK, power_of_two(grouping.features))
    n_rows = _ELEMENTS // block
    constants = {
        "features": grouping.features,
        "sums_stride": sums_stride,
        "slots_stride": slots_stride or 0,
        "has_columns": has_columns,
        "pieces": () if slots_stride is None else _flat(grouping),
        "n_pieces": 0 if slots_stride is None else len(grouping.pieces),
        "ROWS": n_rows,
        "BLOCK": block,
    }
    return constants, n_rows, -(-grouping.features // block)


@functools.cache
def _converts(device: torch.device) -> bool:
    """Whether the device converts float32 to fp8 (e4m3)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
