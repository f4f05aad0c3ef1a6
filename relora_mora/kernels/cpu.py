"""Calls kernels.c, which is compiled when the package is installed, through ctypes, which releases the GIL.

The library shares torch's OpenMP threads (see kernels.c), so torch must be loaded first.
"""

import ctypes
import functools
import struct
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
    job: list[Any] = [ctypes.c_int, ctypes.c_void_p]
    rows, threads = [ctypes.c_int64], [ctypes.c_int]
    scratch: list[Any] = [ctypes.c_void_p, ctypes.c_int64]
    library.remora_sum.argtypes = library.remora_add.argtypes = job + threads + scratch
    library.remora_quantize.argtypes = library.remora_scale.argtypes = job + rows + threads + scratch
    library.remora_loss.argtypes = job + rows + threads
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
def _pieces(grouping: Grouping) -> Tensor:
    return torch.tensor(grouping.pieces, dtype=torch.int64)


def _job(**fields: Tensor | int | None) -> bytes:
    """A struct of kernels.c with these fields, in its order: a tensor is its address, None is NULL."""
    numbers = (field.data_ptr() if isinstance(field, Tensor) else field or 0 for field in fields.values())
    return struct.pack(f"{len(fields)}q", *numbers)


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // _GRAIN))


def _run(kernel: Any, dtype: torch.dtype, job: bytes, *rows: int, elements: int, scratch: int) -> None:
    """Shares the rows of a job among threads, each of which has so many floats of scratch memory."""
    threads = _threads(elements)
    memory = torch.empty(threads, scratch + 16)
    kernel(_TYPES[dtype], job, *rows, threads, memory.data_ptr(), memory.shape[1])


def group_sum(x: Tensor, grouping: Grouping) -> Tensor:
    """x [..., features] -> [..., slots]"""
    pieces = _pieces(grouping)
    rows = as_rows(x)
    y = torch.empty(*x.shape[:-1], grouping.slots, dtype=x.dtype)
    job = _job(
        x=rows,
        y=y,
        rows=rows.shape[0],
        features=rows.shape[1],
        slots=grouping.slots,
        x_stride=rows.stride(0),
        y_stride=grouping.slots,
        pieces=pieces,
        n_pieces=len(pieces),
    )
    _run(_loaded().remora_sum, x.dtype, job, elements=x.numel(), scratch=grouping.slots)
    return y


def expand_add(weight: Tensor, square: Tensor, inputs: Grouping, outputs: Grouping) -> Tensor:
    """weight [out, in] + D square C [out, in]; ``outputs.once`` must hold"""
    assert outputs.once
    weight = as_rows(weight)
    square = as_rows(square)
    result = torch.empty(weight.shape, dtype=weight.dtype)
    in_pieces = _pieces(inputs)
    out_pieces = _pieces(outputs)
    job = _job(
        weight=weight,
        square=square,
        result=result,
        inputs=inputs.features,
        slots=inputs.slots,
        weight_stride=weight.stride(0),
        square_stride=square.stride(0),
        in_pieces=in_pieces,
        out_pieces=out_pieces,
        n_in=len(in_pieces),
        n_out=len(out_pieces),
    )
    scratch = inputs.slots + inputs.features
    _run(_loaded().remora_add, weight.dtype, job, elements=weight.numel(), scratch=scratch)
    return result


def cross_entropy_(logits: Tensor, labels: Tensor, scale: Tensor, ignore: int, gradient: bool) -> Tensor:
    """logits [N, V], labels [N] -> losses [N], float32; 0 for ``ignore``, which is negative.

    With ``gradient``, the logits are replaced by their gradients times ``scale``. Raises IndexError if a label is not
    in the vocabulary.
    """
    assert logits.stride(1) == 1
    vocabulary = logits.shape[1]
    if int(labels.max()) >= vocabulary or bool(((labels < 0) & (labels != ignore)).any()):
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise IndexError(f"labels range from {span}, but the vocabulary has {vocabulary} tokens")
    labels = labels.to(torch.int64).contiguous()
    losses = torch.empty(len(logits))
    job = _job(logits=logits, labels=labels, losses=losses, vocabulary=vocabulary, stride=logits.stride(0))
    job += struct.pack("fi", float(scale), gradient)
    _loaded().remora_loss(_TYPES[logits.dtype], job, len(logits), _threads(logits.numel()))
    return losses


def quantize_rows(x: Tensor, columns: Tensor | None, padded: int) -> tuple[Tensor, Tensor]:
    """x [n, features], columns [features] -> int8 [n, padded], scales [n]"""
    x = as_rows(x)
    n, features = x.shape
    values = torch.empty(n, padded, dtype=torch.int8)
    scales = torch.empty(n)
    job = _job(
        x=x, columns=columns, values=values, scales=scales, features=features, padded=padded, x_stride=x.stride(0)
    )
    _run(_loaded().remora_quantize, x.dtype, job, n, elements=x.numel(), scratch=features)
    return values, scales


def scale_rows(
    sums: Tensor, rows: Tensor, columns: Tensor | None, slots_of: Tensor | None, grouping: Grouping, dtype: torch.dtype
) -> Tensor:
    """sums int32 [n, >= features], rows [n], columns [features], slots_of [n, slots] -> [n, features]"""
    y = torch.empty(len(sums), grouping.features, dtype=dtype)
    pieces = _pieces(grouping)
    if slots_of is not None:
        slots_of = as_rows(slots_of)
        assert slots_of.dtype == dtype
    job = _job(
        sums=sums,
        rows=rows,
        columns=columns,
        slots_of=slots_of,
        y=y,
        features=grouping.features,
        slots=grouping.slots,
        sums_stride=sums.stride(0),
        slots_stride=None if slots_of is None else slots_of.stride(0),
        pieces=pieces,
        n_pieces=len(pieces),
    )
    scratch = grouping.slots + grouping.features
    _run(_loaded().remora_scale, dtype, job, len(sums), elements=y.numel(), scratch=scratch)
    return y
