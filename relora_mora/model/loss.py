"""The output head with its loss, computed in chunks of tokens so that float32 logits [N, V] never exist as a whole.

``F.linear_cross_entropy`` of torch 2.13 does not serve: for bf16 it returns a sum in bf16, which has three digits.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.kernels.ops import cross_entropy_, supports

IGNORE = -100
CHUNK_BYTES = 192 * 2**20  # of logits that exist at once
MIN_CHUNK = 128  # tokens
# Each chunk reads and writes the head's gradient once, in float32, which takes as long as the product of about 1,000
# tokens (H100: 8 V H bytes at 2.4 TB/s, 2 V H FLOPs a token at 60 % of 989 TFLOP/s).
MIN_CHUNK_ON_GPU = 2048  # tokens
# older versions of torch.addmm cannot add bfloat16 factors to a float32 sum (pytorch/pytorch#167931)
ADDS_TO_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


class LossHead(nn.Module):
    """The output head. With labels, it returns their negative log-likelihood instead of logits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None, "a head with a bias is not fused with the loss"
        self.weight: Tensor = linear.weight  # [V, H]; tied embeddings are the same tensor

    def forward(self, hidden: Tensor, labels: Tensor | None = None, tokens: float | None = None) -> Tensor:
        """hidden [..., H] -> logits [..., V], or with labels [...] the result of :func:`chunked_cross_entropy`"""
        if labels is None:
            return F.linear(hidden, self.weight)
        return chunked_cross_entropy(hidden, self.weight, labels, tokens)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, tokens: float | None = None, *, chunk_tokens: int | None = None
) -> Tensor:
    """The sum of the cross-entropy of ``softmax(hidden @ weight.T)`` over the labels other than -100, per ``tokens``.

    hidden [..., H], weight [V, H], labels [...] -> a float32 scalar. The sum is divided by ``tokens``, or by the number
    of those labels if it is None. All micro-batches and ranks of a step pass the same ``tokens``, so that every token
    has the same weight. The gradients are computed in forward, chunk by chunk (as in Liger kernels, arXiv 2410.10989,
    section 3.2), so each logit is computed once and nothing of size [N, V] is kept. Without a label to score, the
    result is 0. A label that is not in the vocabulary raises IndexError on a CPU. On a GPU it makes the result NaN,
    because checking it would wait for the device.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    # inside forward, grad mode is always off and parameters always require gradients, so read the mode here
    return _ChunkedCrossEntropy.apply(flat, weight, labels.reshape(-1), tokens, chunk_tokens, torch.is_grad_enabled())


def loss_chunk(tokens: int, vocabulary: int, bytes_per_logit: int, *, on_gpu: bool = False) -> int:
    """Tokens per chunk: equal chunks with at most ``CHUNK_BYTES`` of logits, but no fewer than the minimum."""
    parts = max(1, math.ceil(tokens * vocabulary * bytes_per_logit / CHUNK_BYTES))
    return max(MIN_CHUNK_ON_GPU if on_gpu else MIN_CHUNK, math.ceil(tokens / parts))


def bytes_per_logit(dtype: torch.dtype, *, in_place: bool) -> int:
    """Bytes that the loss needs per logit. If it is not computed in place, it copies other dtypes to float32."""
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
        vocabulary = len(weight)
        # on a GPU, rows start at multiples of 16 elements, which vector loads and tensor cores need
        width = -(-vocabulary // 16) * 16 if hidden.is_cuda else vocabulary
        buffer = hidden.new_empty(min(chunk, len(hidden)), width)[:, :vocabulary]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight: Tensor | None = None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            piece = hidden[rows]
            loss, d_logits = cross_entropy_(
                torch.mm(piece, weight.T, out=buffer[: len(piece)]),
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
        if scale.is_cuda:  # comparing it with 1 would wait for the device
            d_hidden = None if d_hidden is None else d_hidden.mul_(scale)
            if d_weight is not None:  # in one pass, rounded once
                d_weight = torch.mul(d_weight, scale, out=torch.empty_like(d_weight, dtype=ctx.weight_dtype))
        elif scale != 1:
            d_hidden = None if d_hidden is None else d_hidden * scale
            d_weight = None if d_weight is None else d_weight * scale
        return d_hidden, d_weight, None, None, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, added in float32 or wider (by the product itself on NVIDIA's GPUs); may overwrite ``total``"""
    wide = torch.promote_types(a.dtype, torch.float32)
    if not (a.is_cuda and torch.version.cuda):
        part = a @ b
        return part if total is None else total.to(wide).add_(part)
    if total is None:
        return torch.mm(a, b, out_dtype=wide)
    if not ADDS_TO_FLOAT32:
        return total.add_(torch.mm(a, b, out_dtype=wide))
    return torch.addmm(total, a, b, out_dtype=wide, out=total)
