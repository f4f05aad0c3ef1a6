"""A model of the LLaMA family, built from its config and a seed, and a wrapper that computes its training loss.

On NVIDIA's GPUs, attention inside documents is flash attention without a mask. torch.compile compiles each decoder
layer as one program. The wrapper computes the loss from hidden states in chunks of tokens, so that float32 logits
[tokens, vocabulary] never exist as a whole. Shapes: ``B`` sequences, ``T`` tokens, ``H`` hidden size, ``V`` vocabulary,
``N = B * T``, ``P`` documents, ``D`` features of a head.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import ModelConfig
from relora_mora.model.config import head_width
from relora_mora.model.config_keys import ARCHITECTURES
from relora_mora.model.loss import LossHead
from relora_mora.system.logs import log
from relora_mora.system.process import missing_to_compile
from relora_mora.system.seeds import derived_seed

SDPA_OR_DOCUMENTS = "relora_mora_sdpa_or_documents"  # the name that ``attend`` has for layers of transformers
RECOMPILE_LIMIT = 64  # programs of one layer: training, evaluation and each batch size have their own


def check_attention(settings: ModelConfig, *, bf16: bool) -> None:
    """Raises :class:`ConfigError` if ``model.attention`` does not work on this machine."""
    if settings.attention != "flash_attention_2" or (bf16 and is_flash_attn_2_available()):
        return
    fault = (
        "model.attention: flash_attention_2 needs its package (flash-attn), a GPU, and train.precision=bf16; "
        "use model.attention=sdpa, which uses PyTorch's own flash kernels when it can"
    )
    raise ConfigError([fault], "the settings")


def build_model(model_config: PreTrainedConfig, *, seed: int, attention: str = "sdpa") -> PreTrainedModel:
    """A float32 model on the CPU with initial weights that depend only on the seed."""
    lm = empty_model(model_config, attention=attention)
    put_values(lm, {name: initial_value(lm, name, seed) for name, _ in lm.named_parameters()})
    return lm


def model_class(model_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class in transformers for models with this config."""
    return ARCHITECTURES[model_config.model_type].model_class


def is_of_family(lm: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether :func:`empty_model` could have built this model."""
    return any(type(lm) is architecture.model_class for architecture in ARCHITECTURES.values())


def empty_model(model_config: PreTrainedConfig, *, attention: str = "sdpa") -> PreTrainedModel:
    """The model with float32 parameters on the meta device, without values; :func:`put_values` fills them in."""
    with torch.device("meta"):
        lm = model_class(model_config)._from_config(model_config, attn_implementation=attention, dtype=torch.float32)
    lm.model.rotary_emb = type(lm.model.rotary_emb)(config=model_config)  # computes the only buffers, off meta
    lm.model.embed_tokens.padding_idx = None  # there is no padding, so the embedding of pad_token_id trains too
    return lm


@torch.no_grad()
def initial_value(lm: PreTrainedModel, name: str, seed: int) -> Tensor:
    """The initial float32 value of a parameter of the plain model, with the distribution that transformers uses.

    It depends only on seed, name and shape, so it is the same on every rank and world size, and in any order of draws.
    """
    shape = lm.get_parameter(name).shape
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)  # the weight of a norm
    generator = torch.Generator().manual_seed(derived_seed(seed, "initial", name))
    return torch.empty(shape).normal_(0.0, lm.config.initializer_range, generator=generator)


def put_values(lm: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replaces parameters by name with tensors of any device and dtype; tied parameters stay tied."""
    new = {
        id(old): nn.Parameter(values[name], old.requires_grad) for name, old in lm.named_parameters() if name in values
    }
    for module in lm.modules():
        for key, old in module._parameters.items():
            if id(old) in new:
                module._parameters[key] = new[id(old)]


class LossModel(nn.Module):
    """A causal LM with its loss.

    With ``compiled``, torch.compile compiles each decoder layer as one program. Head and loss have their own kernels.
    """

    def __init__(self, lm: PreTrainedModel, *, compiled: bool = False) -> None:
        super().__init__()
        self.lm = lm
        lm.lm_head = LossHead(lm.lm_head)
        if lm.config._attn_implementation == "sdpa":
            lm.config._attn_implementation = SDPA_OR_DOCUMENTS
        self.compiled = compiled
        if compiled:
            compile_layers(lm.model.layers)

    def forward(
        self, input_ids: Tensor, labels: Tensor, boundaries: Tensor | None = None, tokens: float | None = None
    ) -> Tensor:
        """input_ids [B, T] and labels [B, T] (already shifted; -100 is not scored) -> the loss in nats / ``tokens``.

        Without ``tokens``, it is the mean over the scored tokens. With boundaries [P + 1]
        (:func:`document_boundaries`), every document sees only itself, from position 0, as if it were the only one.
        """
        return self.lm.lm_head(self.hidden(input_ids, boundaries), labels, tokens)

    def hidden(self, input_ids: Tensor, boundaries: Tensor | None) -> Tensor:
        """input_ids [B, T] -> [B, T, H], the same hidden states as ``LlamaModel.forward`` of transformers.

        Transformers reads the positions back to find out whether sequences are packed, and so waits for the device in
        every micro-batch. Here ``boundaries`` says it.
        """
        model = self.lm.model
        hidden = model.embed_tokens(input_ids)
        masking: dict[str, Tensor | None] = {"attention_mask": None}  # without a mask, attention is causal
        if boundaries is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
            if self.lm.config._attn_implementation == "eager":
                masking["attention_mask"] = document_mask(torch.zeros_like(input_ids), hidden.dtype)
        else:
            documents, positions = document_positions(boundaries, input_ids.shape)
            if needs_no_mask(self.lm.config, hidden):
                if self.compiled:  # one program for any number of documents
                    torch._dynamo.mark_dynamic(boundaries, 0)
                masking["boundaries"] = boundaries
            else:
                masking["attention_mask"] = document_mask(documents, hidden.dtype)
        rotary = model.rotary_emb(hidden, position_ids=positions)
        for layer in model.layers:
            hidden = layer(hidden, position_ids=positions, position_embeddings=rotary, **masking)
        return model.norm(hidden)


def document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """document_ids [B, T] -> mask [B, 1, T, T] to add to scores: causal, and only within a document.

    The mask is not boolean because sdpa would convert it in each layer and keep each result for backward.
    """
    same = document_ids.unsqueeze(-1) == document_ids.unsqueeze(-2)
    mask = torch.zeros(same.shape, dtype=dtype, device=same.device)
    return mask.masked_fill_(~same.tril(), -math.inf).unsqueeze(1)


def document_positions(boundaries: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """boundaries [P + 1], shape (B, T) -> the document of each token and its position in it, both int64 [B, T]."""
    token = torch.arange(shape.numel(), device=boundaries.device)
    document = torch.searchsorted(boundaries, token, right=True) - 1
    return document.view(shape), (token - boundaries[document]).view(shape)


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


def compiles(settings: ModelConfig, zero_stage: int, *, on_gpu: bool) -> bool:
    """Whether the decoder layers are compiled: as ``model.compile`` says; ``auto`` means on CUDA with ZeRO 0 to 2."""
    return on_gpu and zero_stage < 3 if settings.compile == "auto" else settings.compile


def compiles_here(settings: ModelConfig, zero_stage: int, *, on_gpu: bool) -> bool:
    """As :func:`compiles`, but false, with a warning, if ``auto`` finds no compiler or no Python headers.

    A CPU needs a C++ compiler, a GPU a C compiler (for Triton). Raises :class:`ConfigError` if ``model.compile`` is
    true and the compiler or the headers are missing.
    """
    if not compiles(settings, zero_stage, on_gpu=on_gpu):
        return False
    missing = missing_to_compile("C" if on_gpu else "C++")
    if missing is None:
        return True
    fault = f"model.compile: torch.compile does not work here: {missing}"
    if settings.compile == "auto":
        log.warning("%s; until then, the layers run uncompiled, which is slower", fault)
        return False
    raise ConfigError([f"{fault}, or leave it at auto"], "the settings")


def allow_programs(count: int) -> None:
    """Lets torch.compile create up to ``count`` programs of one layer; each operator of a run has its own."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, count)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, count)


def compile_layers(layers: nn.ModuleList) -> None:
    """Compiles each decoder layer as one program, for each shape and operator at its first use."""
    allow_programs(RECOMPILE_LIMIT)
    for layer in layers:
        layer.compile(dynamic=False)
