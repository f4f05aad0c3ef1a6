"""A model of the LLaMA family, built from its config and a seed, and a wrapper that computes its training loss.

The wrapper computes the loss from hidden states in chunks of tokens, so that float32 logits [tokens, vocabulary] never
exist as a whole. Shapes: ``B`` sequences, ``T`` tokens, ``H`` hidden size, ``V`` vocabulary, ``N = B * T``.
"""

import math
from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import ModelConfig
from relora_mora.model.attention import SDPA_OR_DOCUMENTS, needs_no_mask
from relora_mora.model.compiler import compile_layers
from relora_mora.model.config_keys import ARCHITECTURES
from relora_mora.model.loss import LossHead
from relora_mora.system.seeds import derived_seed


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
