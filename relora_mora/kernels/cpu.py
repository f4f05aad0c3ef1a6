"""Calls kernels.c, which is compiled when the package is installed, through ctypes, which releases the GIL.

The library shares torch's OpenMP threads (see kernels.c), so torch must be loaded first.
"""

import ctypes
import functools
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relora_mora.kernels.grouping import Grouping, as_rows

SOURCE = Path(__file__).with_name("kernels.c")
LIBRARY = Path(__file__).with_name("_kernels.so")

_TYPES = {torch.bfloat16: 0, torch.float32: 1}
DTYPES = tuple(_TYPES)
BEST = 2  # the last of the instruction sets plain, avx2, avx512
_GRAIN = 32768  # elements per thread, at least


class _Piece(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("feature", "slot", "slots", "repeats", "neighbours")]


class _SumJob(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "features", "slots", "x_stride", "y_stride")),
        ("pieces", ctypes.POINTER(_Piece)),
        ("n_pieces", ctypes.c_int64),
    ]


class _AddJob(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "square", "result")),
        *((name, ctypes.c_int64) for name in ("inputs", "slots", "weight_stride", "square_stride")),
        *((name, ctypes.POINTER(_Piece)) for name in ("in_pieces", "out_pieces")),
        *((name, ctypes.c_int64) for name in ("n_in", "n_out")),
    ]


class _LossJob(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "labels", "losses")),
        *((name, ctypes.c_int64) for name in ("vocabulary", "stride")),
        ("scale", ctypes.c_float),
        ("gradient", ctypes.c_int),
    ]


class _QuantizeJob(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "columns", "values", "scales")),
        *((name, ctypes.c_int64) for name in ("features", "padded", "x_stride")),
    ]


class _ScaleJob(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("sums", "rows", "columns", "slots_of", "y")),
        *((name, ctypes.c_int64) for name in ("features", "slots", "sums_stride", "slots_stride")),
        ("pieces", ctypes.POINTER(_Piece)),
        ("n_pieces", ctypes.c_int64),
    ]


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    if not LIBRARY.exists():
        return "not compiled when the package was installed; install gcc and install the package again"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.remora_source.restype = ctypes.c_uint32
        if library.remora_source() != zlib.crc32(SOURCE.read_bytes()):
            return "compiled from another version of kernels.c; install the package again"
    except (OSError, AttributeError) as error:
        return f"cannot be loaded ({error}); install the package again"
    library.remora_use.argtypes = [ctypes.c_int]
    library.remora_use.restype = ctypes.c_char_p
    arguments: list[Any] = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64]
    library.remora_sum.argtypes = library.remora_add.argtypes = arguments
    library.remora_loss.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    rows: list[Any] = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64]
    library.remora_quantize.argtypes = library.remora_scale.argtypes = rows
    library.remora_sum.restype = library.remora_add.restype = library.remora_loss.restype = None
    library.remora_quantize.restype = library.remora_scale.restype = None
    return library


def available() -> bool:
    """Whether the library can be used."""
    return isinstance(load(), ctypes.CDLL)


def describe() -> str:
    """The library's instruction set, or the reason why there is no library."""
    library = load()
    return f"compiled, {library.remora_use(BEST).decode()}" if isinstance(library, ctypes.CDLL) else f"torch: {library}"


def _loaded() -> ctypes.CDLL:
    library = load()
    assert isinstance(library, ctypes.CDLL)
    return library


@functools.lru_cache(maxsize=4096)
def _pieces(grouping: Grouping) -> ctypes.Array[_Piece]:
    return (_Piece * len(grouping.pieces))(*(_Piece(*piece) for piece in grouping.pieces))


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // _GRAIN))


def group_sum(x: Tensor, grouping: Grouping) -> Tensor:
    """x [..., features] -> [..., slots]"""
    library = _loaded()
    pieces = _pieces(grouping)
    rows = as_rows(x)
    y = torch.empty(*x.shape[:-1], grouping.slots, dtype=x.dtype)
    threads = _threads(x.numel())
    scratch = torch.empty(threads, grouping.slots + 16)
    job = _SumJob(
        rows.data_ptr(),
        y.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        grouping.slots,
        rows.stride(0),
        grouping.slots,
        pieces,
        len(pieces),
    )
    library.remora_sum(_TYPES[x.dtype], ctypes.byref(job), threads, scratch.data_ptr(), scratch.shape[1])
    return y


def expand_add(weight: Tensor, square: Tensor, inputs: Grouping, outputs: Grouping) -> Tensor:
    """weight [out, in] + D square C [out, in]; ``outputs.once`` must hold"""
    library = _loaded()
    assert outputs.once
    weight = as_rows(weight)
    square = as_rows(square)
    result = torch.empty(weight.shape, dtype=weight.dtype)
    in_pieces = _pieces(inputs)
    out_pieces = _pieces(outputs)
    threads = _threads(weight.numel())
    scratch = torch.empty(threads, inputs.slots + inputs.features + 16)
    job = _AddJob(
        weight.data_ptr(),
        square.data_ptr(),
        result.data_ptr(),
        inputs.features,
        inputs.slots,
        weight.stride(0),
        square.stride(0),
        in_pieces,
        out_pieces,
        len(in_pieces),
        len(out_pieces),
    )
    library.remora_add(_TYPES[weight.dtype], ctypes.byref(job), threads, scratch.data_ptr(), scratch.shape[1])
    return result


def cross_entropy_(logits: Tensor, labels: Tensor, scale: Tensor, ignore: int, gradient: bool) -> Tensor:
    """logits [N, V], labels [N] -> losses [N], float32; 0 for ``ignore``, which is negative.

    With ``gradient``, the logits are replaced by their gradients times ``scale``. Raises IndexError if a label is not
    in the vocabulary.
    """
    library = _loaded()
    assert logits.stride(1) == 1
    vocabulary = logits.shape[1]
    if int(labels.max()) >= vocabulary or bool(((labels < 0) & (labels != ignore)).any()):
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise IndexError(f"labels range from {span}, but the vocabulary has {vocabulary} tokens")
    labels = labels.to(torch.int64).contiguous()
    losses = torch.empty(len(logits))
    job = _LossJob(
        logits.data_ptr(),
        labels.data_ptr(),
        losses.data_ptr(),
        vocabulary,
        logits.stride(0),
        float(scale),
        int(gradient),
    )
    library.remora_loss(_TYPES[logits.dtype], ctypes.byref(job), len(logits), _threads(logits.numel()))
    return losses


def quantize_rows(x: Tensor, columns: Tensor | None, padded: int) -> tuple[Tensor, Tensor]:
    """x [n, features], columns [features] -> int8 [n, padded], scales [n]"""
    library = _loaded()
    x = as_rows(x)
    n, features = x.shape
    values = torch.empty(n, padded, dtype=torch.int8)
    scales = torch.empty(n)
    job = _QuantizeJob(
        x.data_ptr(),
        _address(columns),
        values.data_ptr(),
        scales.data_ptr(),
        features,
        padded,
        x.stride(0),
    )
    threads = _threads(x.numel())
    scratch = torch.empty(threads, features + 16)
    library.remora_quantize(_TYPES[x.dtype], ctypes.byref(job), n, threads, scratch.data_ptr(), scratch.shape[1])
    return values, scales


def scale_rows(
    sums: Tensor, rows: Tensor, columns: Tensor | None, slots_of: Tensor | None, grouping: Grouping, dtype: torch.dtype
) -> Tensor:
    """sums int32 [n, >= features], rows [n], columns [features], slots_of [n, slots] -> [n, features]"""
    library = _loaded()
    n = len(sums)
    y = torch.empty(n, grouping.features, dtype=dtype)
    pieces = _pieces(grouping)
    if slots_of is not None:
        slots_of = as_rows(slots_of)
        assert slots_of.dtype == dtype
    job = _ScaleJob(
        sums.data_ptr(),
        rows.data_ptr(),
        _address(columns),
        _address(slots_of),
        y.data_ptr(),
        grouping.features,
        grouping.slots,
        sums.stride(0),
        0 if slots_of is None else slots_of.stride(0),
        pieces,
        len(pieces),
    )
    threads = _threads(y.numel())
    scratch = torch.empty(threads, grouping.slots + grouping.features + 16)
    library.remora_scale(_TYPES[dtype], ctypes.byref(job), n, threads, scratch.data_ptr(), scratch.shape[1])
    return y


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
