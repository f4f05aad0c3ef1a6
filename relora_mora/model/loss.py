"""The output head with its loss, in chunks of tokens: float32 logits [N, V] never exist as a whole."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.kernels import cross_entropy_, supports

IGNORE = -100
CHUNK_BYTES = 192 * 2**20  # of logits that exist at once
LEAST = 128  # tokens of a chunk
# Each chunk reads and writes the head's gradient once, in float32, which takes as long as its product of about 1,000
# tokens (H100: 8 V H bytes at 2.4 TB/s, 2 V H FLOPs a token at 60 % of 989 TFLOP/s).
LEAST_ON_GPU = 2048
# before, torch.addmm had no sum in float32 beside factors in bfloat16 (pytorch/pytorch#167931)
ADDS_TO_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


class LossHead(nn.Module):
    """The output head; with labels it returns their negative log-likelihood in place of logits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None, "LLaMA's head has no bias"
        self.weight: Tensor = linear.weight  # [V, H], the same tensor where embeddings are tied

    def forward(self, hidden: Tensor, labels: Tensor | None = None, tokens: float | None = None) -> Tensor:
        """hidden [..., H] -> logits [..., V], or with labels [...] what :func:`chunked_cross_entropy` gives"""
        if labels is None:
            return F.linear(hidden, self.weight)
        return chunked_cross_entropy(hidden, self.weight, labels, tokens)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, tokens: float | None = None, *, chunk_tokens: int | None = None
) -> Tensor:
    """Cross-entropy of ``softmax(hidden @ weight.T)``, summed over the labels that are not -100 and divided by
    ``tokens``.

    hidden [..., H], weight [V, H], labels [...] -> a float32 scalar. Without ``tokens`` it is the mean over those
    labels. A step over several micro-batches and ranks gives each of them the same number, so that every token weighs
    the same. The gradients are computed in forward, chunk by chunk (as in Liger kernels, arXiv 2410.10989, section
    3.2): one logits product in all, and of size [N, V] nothing is ever kept. With no label to score the result is 0.
    A label that is not in the vocabulary raises IndexError on a CPU. On a GPU, where to look at it would wait for the
    device, it makes the result NaN.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    # inside forward grad is always off and parameters always ask for theirs: whether anybody wants one is known here
    return _ChunkedCrossEntropy.apply(flat, weight, labels.reshape(-1), tokens, chunk_tokens, torch.is_grad_enabled())


def loss_chunk(tokens: int, vocabulary: int, bytes_per_logit: int, *, on_gpu: bool = False) -> int:
    """Tokens whose logits exist at once: equal parts of all, of at most ``CHUNK_BYTES``, or the least on the device."""
    parts = max(1, math.ceil(tokens * vocabulary * bytes_per_logit / CHUNK_BYTES))
    return max(LEAST_ON_GPU if on_gpu else LEAST, math.ceil(tokens / parts))


def bytes_per_logit(dtype: torch.dtype, *, in_place: bool) -> int:
    """Where the loss does not work in place, logits that are not float32 have a copy in float32."""
    return dtype.itemsize + (0 if in_place or dtype is torch.float32 else 4)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        tokens: float | None,
        chunk: int | None,
        training: bool,
    ) -> Tensor:
        """hidden [N, H], weight [V, H], labels [N]"""
        needs_hidden, needs_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        if tokens is None:
            scored = (labels != IGNORE).sum().clamp(min=1)
        else:
            scored = torch.full((), tokens, dtype=torch.float32, device=hidden.device)
        scale = 1.0 / scored
        in_place = supports(hidden)
        logit_bytes = bytes_per_logit(hidden.dtype, in_place=in_place)
        chunk = chunk or loss_chunk(len(hidden), len(weight), logit_bytes, on_gpu=in_place and hidden.is_cuda)
        room = _logits(min(chunk, len(hidden)), len(weight), hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight: Tensor | None = None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            piece = hidden[rows]
            loss, d_logits = cross_entropy_(
                torch.mm(piece, weight.T, out=room[: len(piece)]),
                labels[rows],
                ignore=IGNORE,
                scale=scale,
                gradient=needs_hidden or needs_weight,
            )
            total += loss
            if d_hidden is not None and d_logits is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if needs_weight and d_logits is not None:
                d_weight = _add_product(d_weight, d_logits.T, piece)
        if d_weight is not None and not d_weight.is_cuda:
            d_weight = d_weight.to(weight.dtype)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(d_hidden, d_weight)
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        scale = grads[0]
        d_hidden, d_weight = ctx.saved_tensors
        if scale.is_cuda:  # to look at it would wait for the device
            d_hidden = None if d_hidden is None else d_hidden.mul_(scale)
            d_weight = None if d_weight is None else _rounded_product(d_weight, scale, ctx.weight_dtype)
        elif scale != 1:
            d_hidden = None if d_hidden is None else d_hidden * scale
            d_weight = None if d_weight is None else d_weight * scale
        return d_hidden, d_weight, None, None, None, None


def _logits(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """Room for logits [rows, V]. On a GPU rows begin at multiples of 16 elements, as vectors and tensor cores want."""
    width = -(-vocabulary // 16) * 16 if like.is_cuda else vocabulary
    return like.new_empty(rows, width)[:, :vocabulary]


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b: parts add up in float32 or wider, on NVIDIA's GPUs in the product; ``total`` may be overwritten"""
    wide = torch.promote_types(a.dtype, torch.float32)
    if not (a.is_cuda and torch.version.cuda):
        part = a @ b
        return part if total is None else total.to(wide).add_(part)
    if total is None:
        return torch.mm(a, b, out_dtype=wide)
    if not ADDS_TO_FLOAT32:
        return total.add_(torch.mm(a, b, out_dtype=wide))
    return torch.addmm(total, a, b, out_dtype=wide, out=total)


def _rounded_product(a: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a * scale in one pass, rounded once"""
    return torch.mul(a, scale, out=torch.empty_like(a, dtype=dtype))
