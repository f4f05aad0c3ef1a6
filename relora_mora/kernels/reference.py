"""The same as the kernels in torch operations: the fallback on every device, and the reference in tests."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import active_fake_mode

from relora_mora.kernels.grouping import Grouping, Piece


def expand_add(weight: Tensor, square: Tensor, inputs: Grouping, outputs: Grouping) -> Tensor:
    """weight [out, in] + D square C, one addition per piece of outputs and inputs; not differentiable."""
    if torch.compiler.is_compiling():
        # compiles to one kernel, and does not write into views
        return weight + outputs.copy(inputs.copy(square).mT).mT
    result = torch.empty_like(weight)
    with torch.no_grad():
        for down in outputs.pieces:
            end = 0
            for across in inputs.pieces:
                source = weight if across.feature >= end else result  # a feature's second slot is added to the first
                end = max(end, across.columns.stop)
                part = square[down.slot_range, across.slot_range]
                part = part.unsqueeze(1 if down.neighbours else 0).unsqueeze(3 if across.neighbours else 2)
                torch.add(_crossing(source, down, across), part, out=_crossing(result, down, across))
    return result


def _crossing(matrix: Tensor, down: Piece, across: Piece) -> Tensor:
    """A view of two pieces' elements: slots and repeats (in either order) of outputs, then of inputs."""
    columns, _ = across.by_slot(matrix, 1)
    return down.by_slot(columns, 0)[0]


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore: int, scale: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses [N] and the gradient of ``ops.cross_entropy_``; copies the logits to float32."""
    wide = logits.float()
    log_sum = wide.logsumexp(-1, keepdim=True)
    keep = (labels != ignore).unsqueeze(-1)
    index = labels.clamp(min=0).unsqueeze(-1)
    losses = ((log_sum - wide.gather(-1, index)) * keep).squeeze(-1)
    if not gradient:
        return losses, None
    probabilities = wide.sub_(log_sum).exp_()
    probabilities.scatter_add_(-1, index, torch.full_like(log_sum, -1.0))
    return losses, probabilities.mul_(keep * scale).to(logits.dtype)


def dense(values: Tensor, scales: Tensor, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    """See ``ops.dense``; ``after`` is not read."""
    return values.float().mul_(scales.unsqueeze(1)).to(dtype)


LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # its reciprocal is finite


def quantize_rows(x: Tensor, kind: torch.dtype, columns: Tensor | None, padded: int) -> tuple[Tensor, Tensor]:
    """See ``ops.quantize_rows``."""
    wide = x.float() if columns is None else x.float() * columns
    scales = (wide.abs().amax(-1) / LARGEST[kind]).clamp(min=SMALLEST_SCALE)
    values = wide * scales.reciprocal().unsqueeze(-1)
    values = F.pad(values.round() if kind is torch.int8 else values, (0, padded - x.shape[1]))
    return values.to(kind), scales


def scale_rows(
    sums: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    dtype: torch.dtype,
    grouping: Grouping,
    slots_of: Tensor | None,
) -> Tensor:
    """See ``ops.scale_rows``."""
    result = sums[:, : grouping.features].float() * rows.unsqueeze(-1)
    if columns is not None:
        result = result * columns[: grouping.features]
    if slots_of is not None:
        result = result + grouping.copy(slots_of.float())
    return result.to(dtype)


ROPE_BASE = 10000.0


def blocks_of(in_features: int, out_features: int, size: int) -> int:
    """B, the number of blocks of R inputs that contribute to outputs."""
    return -(-min(in_features, out_features) // size)


def angles(blocks: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [B, R] for block j and feature i, with paired halves; computed in float32"""
    # torch's compiler ignores a cache, and warns about it since 2.15; a fake tensor must not be in it
    cached = not torch.compiler.is_compiling() and active_fake_mode() is None
    tables = _tables if cached else _tables.__wrapped__
    return tables(blocks, size, dtype, device)


@lru_cache(maxsize=256)
def _tables(blocks: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    inverse = 1.0 / (ROPE_BASE ** (torch.arange(0, size, 2).float() / size))
    table = torch.outer(torch.arange(blocks).float(), inverse)
    table = torch.cat([table, table], -1)
    return table.cos().to(device, dtype), table.sin().to(device, dtype)


def add_blocks(total: Tensor, square: Tensor) -> Tensor:
    """Adds ``square Rot_j`` to total [out, in] in place, at every crossing of input block j and its outputs."""
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
    """See ``ops.rotary_add``; ``after`` is not read."""
    return add_blocks(weight.clone(memory_format=torch.contiguous_format), square)
