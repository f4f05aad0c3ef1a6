"""The loss of a language model's head on GPUs: one row of logits at a time, overwritten in place, as in kernels.c.

A program passes over one row twice. The first pass computes the largest logit and the sum of exponentials together
(online softmax, arXiv 1805.02867, algorithm 3), the second writes the gradients. The second pass finds the row in the
cache: with this many threads, two programs fit on a multiprocessor, and the rows of all programs fit in the L2 cache of
an A100 or H100 up to about 80,000 logits in bfloat16 (calculated).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from relora_mora.kernels import reference
from relora_mora.kernels.triton_launch import launch, power_of_two, works_on

_WARPS = 16
_BLOCK = 8192  # logits at a time: 16 for each thread


@triton.jit
def _add_up(x, highest, sums):
    """Adds a block ``x`` to the largest logit so far and to the exponentials relative to it."""
    higher = tl.maximum(highest, tl.max(x, 0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf means that all tokens so far are ruled out
    return higher, sums * tl.exp(highest - shift) + tl.exp(x - shift)


@triton.jit
def _gradients(x, columns, label, highest, inverse, scale):
    return (tl.exp(x - highest) * inverse - tl.where(columns == label, 1.0, 0.0)) * scale


@triton.jit
def _cross_entropy(
    logits,
    labels,
    scale,
    losses,
    vocabulary: tl.constexpr,
    stride: tl.constexpr,
    ignore: tl.constexpr,
    gradient: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    whole: tl.constexpr = vocabulary // block * block
    columns = tl.arange(0, block)
    inside = whole + columns < vocabulary
    if label == ignore:
        tl.store(losses + row, 0.0)
        if gradient:
            zeros = tl.zeros([block], logits.dtype.element_ty)
            for start in range(0, whole, block):
                tl.store(logits + start + columns, zeros)
            if whole < vocabulary:
                tl.store(logits + whole + columns, zeros, mask=inside)
        return
    label_logit = tl.load(logits + label, mask=(label >= 0) & (label < vocabulary), other=float("nan")).to(tl.float32)
    highest = float("-inf")
    sums = tl.zeros([block], tl.float32)
    for start in range(0, whole, block):
        highest, sums = _add_up(tl.load(logits + start + columns).to(tl.float32), highest, sums)
    if whole < vocabulary:  # separate, because a mask prevents vector loads if the vocabulary is odd
        rest = tl.load(logits + whole + columns, mask=inside, other=float("-inf")).to(tl.float32)
        highest, sums = _add_up(rest, highest, sums)
    total = tl.sum(sums, 0)
    tl.store(losses + row, tl.log(total) + highest - label_logit)
    if gradient:
        factor = tl.load(scale)
        inverse = 1.0 / total
        for start in range(0, whole, block):
            x = tl.load(logits + start + columns).to(tl.float32)
            tl.store(logits + start + columns, _gradients(x, start + columns, label, highest, inverse, factor))
        if whole < vocabulary:
            x = tl.load(logits + whole + columns, mask=inside).to(tl.float32)
            tl.store(
                logits + whole + columns, _gradients(x, whole + columns, label, highest, inverse, factor), mask=inside
            )


def cross_entropy_(logits: Tensor, labels: Tensor, scale: Tensor, ignore: int, gradient: bool) -> Tensor:
    """logits [N, V], labels [N] -> losses [N], float32; 0 for ``ignore``, NaN for a label outside the vocabulary.

    With ``gradient``, the logits are replaced by their gradients times ``scale``, a float32 scalar on the same device.
    """
    if not works_on(logits.device):
        losses, d_logits = reference.cross_entropy(logits, labels, ignore=ignore, scale=scale, gradient=gradient)
        if d_logits is not None:
            logits.copy_(d_logits)
        return losses
    assert logits.stride(1) == 1
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    constants = {
        "vocabulary": vocabulary,
        "stride": logits.stride(0),
        "ignore": ignore,
        "gradient": gradient,
        "block": min(_BLOCK, power_of_two(vocabulary)),
    }
    if rows:
        launch(_cross_entropy, (rows, 1, 1), (logits, labels.contiguous(), scale, losses), (), constants, warps=_WARPS)
    return losses
