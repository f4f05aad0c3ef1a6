"""Documents of packed sequences: they stay apart in the attention of every model, on a GPU without a mask if possible.

Transformers calls a mask builder for each kind of attention in a model (causal, windows, chunks), and the attention in
each layer, both by the name in ``config._attn_implementation``. Shapes: ``B`` sequences, ``T`` tokens, ``P``
documents, ``N = B * T``, ``D`` features of a head.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import ModelConfig

SDPA_OR_DOCUMENTS = "relora_mora_sdpa_or_documents"  # the name of ``attend`` and of its masks


class _Batch:
    """The documents of the batch in forward. ``known``: this package calls the model, and not another program."""

    known = False
    flash = False  # whether :func:`attend` gets the boundaries of documents in every layer
    numbers: Tensor | None = None  # [B, T], the document of each token, or None if each row is one document
    positions: Tensor | None = None  # [B, T], the position of each token in its document


def check_attention(settings: ModelConfig, *, bf16: bool) -> None:
    """Raises :class:`ConfigError` if ``model.attention`` does not work on this machine."""
    if settings.attention != "flash_attention_2" or (bf16 and is_flash_attn_2_available()):
        return
    fault = (
        "model.attention: flash_attention_2 needs its package (flash-attn), a GPU, and train.precision=bf16; "
        "use model.attention=sdpa, which uses PyTorch's own flash kernels when it can"
    )
    raise ConfigError([fault], "the settings")


@contextlib.contextmanager
def documents(boundaries: Tensor | None, shape: torch.Size, *, flash: bool) -> Iterator[Tensor | None]:
    """Keeps documents apart in all masks that are built inside; yields the position of each token in its document.

    ``boundaries`` [P + 1] are those of a batch of ``shape`` (B, T), or None if each row is one document. With
    ``flash``, the caller gives them to the attention of every layer, and plain attention gets no mask.
    """
    _Batch.known = True
    _Batch.flash = flash
    if boundaries is not None:
        token = torch.arange(shape.numel(), device=boundaries.device)
        document = torch.searchsorted(boundaries, token, right=True) - 1
        _Batch.numbers = document.view(shape)
        _Batch.positions = (token - boundaries[document]).view(shape)
    try:
        yield _Batch.positions
    finally:
        _Batch.known = False
        _Batch.flash = False
        _Batch.numbers = _Batch.positions = None


_find = masking_utils.find_packed_sequence_indices


def _known_or_found(position_ids: Tensor) -> Tensor | None:
    """Transformers finds documents by reading positions, and so waits for the device; here they are known."""
    return None if _Batch.known else _find(position_ids)


masking_utils.find_packed_sequence_indices = _known_or_found


def _of_positions(mask_function: Any, positions: Tensor) -> Any:
    """A mask function of transformers that counts positions inside of documents; older versions have none."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Any:
        return mask_function(batch, head, positions[batch, query], positions[batch, key])

    return mask


def _separating(build: Any) -> Any:
    """A mask builder of transformers that also keeps documents apart; windows and chunks count inside a document."""

    def mask(*args: Any, mask_function: Any = masking_utils.causal_mask_function, **settings: Any) -> Tensor | None:
        if _Batch.numbers is not None and _Batch.positions is not None:
            mask_function = masking_utils.and_masks(
                _of_positions(mask_function, _Batch.positions),
                masking_utils.packed_sequence_mask_function(_Batch.numbers),
            )
            settings["allow_is_causal_skip"] = False
        result: Tensor | None = build(*args, mask_function=mask_function, **settings)
        return result

    return mask


def _mask_of_attend(
    *args: Any,
    mask_function: Any = masking_utils.causal_mask_function,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Tensor | None:
    """The mask for :func:`attend`, [B, 1, T, T] to add to scores, or None if it needs none.

    It is not boolean because sdpa would convert it in each layer and keep each result for backward.
    """
    reach = settings.get("local_size")
    if reach is not None and settings["q_length"] <= reach:  # a window or a chunk that holds the whole sequence
        settings["local_size"] = None
        mask_function = masking_utils.causal_mask_function
    if _Batch.flash and mask_function is masking_utils.causal_mask_function:
        return None
    kept = _sdpa_mask(*args, mask_function=mask_function, **settings)
    return None if kept is None else torch.zeros_like(kept, dtype=dtype).masked_fill_(~kept, -math.inf)


_sdpa_mask = _separating(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
for _name in ("sdpa", "eager"):
    AttentionMaskInterface.register(_name, _separating(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[_name]))
AttentionMaskInterface.register(SDPA_OR_DOCUMENTS, _mask_of_attend)


def head_width(model_config: PreTrainedConfig) -> int:
    """The number of features of an attention head."""
    width: int = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
    return width


def flash_supports(width: int, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention for sequences of various lengths supports heads of ``width`` features."""
    return dtype is torch.bfloat16 and width % 8 == 0 and width <= 256


def needs_no_mask(lm: PreTrainedModel, device: torch.device) -> bool:
    """Whether :func:`attend` keeps documents apart without a mask in a model on this device."""
    dtype: Any = lm.get_input_embeddings().weight.dtype
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and lm.config._attn_implementation == SDPA_OR_DOCUMENTS
        and flash_supports(head_width(lm.config), dtype)
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
    if boundaries is None or attention_mask is not None:
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
    since, has no dropout, and its wrapper costs the host 150 us more per layer.
    """
    output: Tensor
    output, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, boundaries, boundaries, longest, longest, dropout, True, False, scale=scale
    )
    return output


AttentionInterface.register(SDPA_OR_DOCUMENTS, attend)
