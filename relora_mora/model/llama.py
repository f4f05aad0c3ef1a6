"""A model of the LLaMA family: built from its config with a seed, wrapped with its training loss.

The wrapper computes the loss from hidden states in chunks of tokens, so that float32 logits [tokens, vocabulary] never
exist as a whole. Shapes: ``B`` sequences, ``T`` tokens, ``H`` hidden size, ``V`` vocabulary, ``N = B * T``.
"""

from __future__ import annotations

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
    """Raises :class:`ConfigError` where ``model.attention`` cannot be computed here."""
    if settings.attention != "flash_attention_2" or (bf16 and is_flash_attn_2_available()):
        return
    fault = (
        "model.attention: flash_attention_2 needs its package (flash-attn), a GPU, and train.precision=bf16; "
        "use model.attention=sdpa, which takes PyTorch's own flash kernels where it can"
    )
    raise ConfigError([fault], "the settings")


def build_model(model_config: PreTrainedConfig, *, seed: int, attention: str = "sdpa") -> PreTrainedModel:
    """A float32 model on the CPU with initial weights that depend on the seed only."""
    lm = empty_model(model_config, attention=attention)
    put_values(lm, {name: initial_value(lm, name, seed) for name, _ in lm.named_parameters()})
    return lm


def model_class(model_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class in transformers of the models with such a config."""
    return ARCHITECTURES[model_config.model_type].model_class


def is_of_family(lm: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether a model is one that :func:`empty_model` makes."""
    return any(type(lm) is architecture.model_class for architecture in ARCHITECTURES.values())


def empty_model(model_config: PreTrainedConfig, *, attention: str = "sdpa") -> PreTrainedModel:
    """The model with float32 parameters on the meta device, without values: :func:`put_values` gives them."""
    with torch.device("meta"):
        lm = model_class(model_config)._from_config(model_config, attn_implementation=attention, dtype=torch.float32)
    lm.model.rotary_emb = type(lm.model.rotary_emb)(config=model_config)  # the only buffers, which are no drawn values
    lm.model.embed_tokens.padding_idx = None  # nothing is padded: pad_token_id names a token that trains
    return lm


@torch.no_grad()
def initial_value(lm: PreTrainedModel, name: str, seed: int) -> Tensor:
    """The float32 value that a parameter of the plain model begins with; distributed as transformers initializes it.

    It follows from seed, name and shape alone: the same on every rank and world size, in whatever order they are drawn.
    """
    shape = lm.get_parameter(name).shape
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)  # a norm's
    generator = torch.Generator().manual_seed(derived_seed(seed, "initial", name))
    return torch.empty(shape).normal_(0.0, lm.config.initializer_range, generator=generator)


def put_values(lm: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Puts tensors, of any device and dtype, in the place of the parameters of these names; tied ones stay tied."""
    new = {
        id(old): nn.Parameter(values[name], old.requires_grad) for name, old in lm.named_parameters() if name in values
    }
    for module in lm.modules():
        for key, old in module._parameters.items():
            if id(old) in new:
                module._parameters[key] = new[id(old)]


class LossModel(nn.Module):
    """A causal LM together with its loss.

    ``compiled`` has torch.compile make one program of each decoder layer; head and loss have kernels of their own.
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
        """input_ids [B, T] and labels [B, T] (already shifted, -100 is not scored) -> nats / ``tokens``.

        Without ``tokens`` it is the mean over the scored tokens.
        With boundaries [P + 1] (:func:`document_boundaries`) every document sees what it sees where it
        is scored alone: itself, from position 0 on.
        """
        return self.lm.lm_head(self.hidden(input_ids, boundaries), labels, tokens)

    def hidden(self, input_ids: Tensor, boundaries: Tensor | None) -> Tensor:
        """input_ids [B, T] -> [B, T, H], what ``LlamaModel.forward`` of transformers computes.

        That one looks at the values of positions to find out whether sequences are packed, and so waits for the device
        at every micro-batch. Here that is known.
        """
        model = self.lm.model
        hidden = model.embed_tokens(input_ids)
        causal: dict[str, Tensor | None] = {"attention_mask": None}  # the kernels are told so
        if boundaries is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
            if self.lm.config._attn_implementation == "eager":
                causal["attention_mask"] = document_mask(torch.zeros_like(input_ids), hidden.dtype)
        else:
            documents, positions = document_positions(boundaries, input_ids.shape)
            if needs_no_mask(self.lm.config, hidden):
                if self.compiled:  # one program for any number of documents
                    torch._dynamo.mark_dynamic(boundaries, 0)
                causal["boundaries"] = boundaries
            else:
                causal["attention_mask"] = document_mask(documents, hidden.dtype)
        rotary = model.rotary_emb(hidden, position_ids=positions)
        for layer in model.layers:
            hidden = layer(hidden, position_ids=positions, position_embeddings=rotary, **causal)
        return model.norm(hidden)


def document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """document_ids [B, T] -> mask [B, 1, T, T] to add to scores: causal, and only within a document.

    Not boolean: sdpa would make this one of it in each layer, and keep each for backward.
    """
    same = document_ids.unsqueeze(-1) == document_ids.unsqueeze(-2)
    mask = torch.zeros(same.shape, dtype=dtype, device=same.device)
    return mask.masked_fill_(~same.tril(), -math.inf).unsqueeze(1)


def document_positions(boundaries: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """boundaries [P + 1], shape (B, T) -> int64 [B, T], twice: the document of each token, and its place in there."""
    token = torch.arange(shape.numel(), device=boundaries.device)
    document = torch.searchsorted(boundaries, token, right=True) - 1
    return document.view(shape), (token - boundaries[document]).view(shape)
