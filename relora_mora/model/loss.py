"""The output head with its loss, in chunks of tokens: float32 logits [N, V] never exist as a whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.kernels import cross_entropy_, takes

IGNORE = -100
CHUNK_BYTES = 192 * 2**20  # of logits that exist at once


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
    Raises IndexError for a label that is not in the vocabulary. On CUDA liger-kernel's own kernels do the same where
    the package is installed (then a wrong label is not found out).
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    labels = labels.reshape(-1)
    fused = fused_loss(hidden.device.type) if chunk_tokens is None else None
    if fused is not None:
        reduction = "mean" if tokens is None else "sum"
        loss = fused(flat, weight, labels, ignore_index=IGNORE, reduction=reduction, accum_dtype=torch.float32).float()
        return loss if tokens is None else loss / tokens
    # inside forward grad is always off and parameters always ask for theirs: whether anybody wants one is known here
    return _ChunkedCrossEntropy.apply(flat, weight, labels, tokens, chunk_tokens, torch.is_grad_enabled())


@functools.cache
def fused_loss(device: str) -> Callable[..., Tensor] | None:
    """liger-kernel's cross-entropy of a linear layer for tensors on such a device, None where there is none."""
    if device != "cuda":
        return None
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    function: Callable[..., Tensor] = liger_fused_linear_cross_entropy
    return function


def loss_chunk(tokens: int, vocabulary: int, bytes_per_logit: int) -> int:
    """Tokens whose logits exist at once: equal parts of all, of at most ``CHUNK_BYTES``, but not less than 128."""
    parts = max(1, math.ceil(tokens * vocabulary * bytes_per_logit / CHUNK_BYTES))
    return max(128, math.ceil(tokens / parts))


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
        gradient = needs_hidden or needs_weight
        scale = 1.0 / (
            (labels != IGNORE).sum().clamp(min=1) if tokens is None else labels.new_tensor(tokens, dtype=torch.float32)
        )
        chunk = chunk or loss_chunk(len(hidden), len(weight), bytes_per_logit(hidden.dtype, in_place=takes(hidden)))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight: Tensor | None = None
        for start in range(0, len(hidden), chunk):
            piece = hidden[start : start + chunk]
            target = labels[start : start + chunk]
            loss, d_logits = cross_entropy_(
                F.linear(piece, weight), target, ignore=IGNORE, scale=scale, gradient=gradient
            )
            total += loss
            if d_hidden is not None and d_logits is not None:
                d_hidden[start : start + chunk] = d_logits @ weight
            if needs_weight and d_logits is not None:
                part = d_logits.T @ piece
                d_weight = part if d_weight is None else d_weight.float() + part  # the parts add up in float32
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        scale = grads[0]
        if scale.device.type == "cpu" and scale == 1:  # elsewhere to look at it would wait for the device
            return *ctx.saved_tensors, None, None, None, None
        d_hidden, d_weight = (None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None
