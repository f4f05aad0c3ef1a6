"""Attention inside documents, given their boundaries: on NVIDIA's GPUs flash attention without a mask.

Shapes: ``B`` sequences, ``T`` tokens, ``N = B * T``, ``P`` documents, ``D`` features of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from relora_mora.model.config import head_width

SDPA_OR_DOCUMENTS = "relora_mora_sdpa_or_documents"  # the name that ``attend`` has for layers of transformers


def flash_supports(width: int, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention for sequences of various lengths supports heads of ``width`` features."""
    return dtype is torch.bfloat16 and width % 8 == 0 and width <= 256


def needs_no_mask(model_config: PreTrainedConfig, hidden: Tensor) -> bool:
    """Whether :func:`attend` keeps documents apart without a mask, for hidden states of this device and dtype."""
    return (
        hidden.is_cuda
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
        and model_config._attn_implementation == SDPA_OR_DOCUMENTS
        and flash_supports(head_width(model_config), hidden.dtype)
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    boundaries: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """query [B, heads, T, D], key and value [B, fewer heads, T, D] -> [B, T, heads, D], causal.

    With ``boundaries`` (:func:`document_boundaries`), tokens attend only within their document. Otherwise this is
    transformers' attention with torch's ``scaled_dot_product_attention``. If that cannot use flash attention on a GPU,
    keys and values are repeated for every head: before torch 2.15 no other fused kernel accepts fewer key heads, and
    the fallback keeps [T, T] of each head.
    """
    if boundaries is None:
        if query.is_cuda and attention_mask is None and not flash_supports(query.shape[-1], query.dtype):
            repeats = query.shape[1] // key.shape[1]
            key, value = (repeat_kv(x, repeats) for x in (key, value))
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return result
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    sequences, length = query.shape[:2]
    output = flash(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        boundaries,
        longest=length,
        dropout=settings["dropout"],
        scale=settings["scaling"],
    )
    return output.unflatten(0, (sequences, length)), None


def flash(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, *, longest: int, dropout: float, scale: float
) -> Tensor:
    """query [N, heads, D], key and value [N, fewer heads, D], boundaries int32 [P + 1] -> [N, heads, D].

    ``torch.nn.attention.varlen`` calls the same operator, but it appeared in torch 2.10, has changed its arguments
    since, has no dropout, and its wrapper costs the host 150 us more per layer (docs/performance.md).
    """
    output: Tensor
    output, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, boundaries, boundaries, longest, longest, dropout, True, False, scale=scale
    )
    return output


AttentionInterface.register(SDPA_OR_DOCUMENTS, attend)
