"""Arithmetic of one token, from the shapes of the layers.

Counted are the matrix products, a multiplication and an addition as two FLOPs; forward and backward together. A linear
in -> out that trains costs 6 in out: 2 forward, 2 for the input's gradient, 2 for the weight's. A frozen one costs
4 in out. Attention counts the whole square of positions, as is usual (PaLM, arXiv 2204.02311, appendix B), though kernels
skip the masked half. The input's gradient is counted for every layer, the first too. Sums and copies of the operators,
norms, rotary embeddings and the optimizer are memory traffic and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from relora_mora.config import Config
from relora_mora.methods.inject import decoder_linears, inject
from relora_mora.methods.layers import AdapterLinear, LoRALinear, MoRALinear
from relora_mora.operators import make_operator
from relora_mora.optim import set_trainable


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token, forward and backward.

    ``recomputed`` is what activation checkpointing does a second time: part of the work, not of the model's arithmetic,
    so utilisation ("model FLOPs utilisation") leaves it out.
    """

    linears: float
    adapters: float
    attention: float
    head: float
    recomputed: float

    @property
    def total(self) -> float:
        """What the model's arithmetic needs."""
        return self.linears + self.adapters + self.attention + self.head

    @property
    def performed(self) -> float:
        """What the devices do."""
        return self.total + self.recomputed


def meta_model(model_config: LlamaConfig, config: Config) -> LlamaForCausalLM:
    """The model with its adapters and its trainable parameters marked, without memory (on the meta device)."""
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config)
        if config.uses_adapters:
            inject(model, config.method, seed=config.train.seed)
    set_trainable(model, config)
    return model


def flops_per_token(model_config: LlamaConfig, config: Config) -> Flops:
    """FLOPs of one token in training with these settings; nothing is allocated."""
    return flops_of(meta_model(model_config, config), model_config, config)


def flops_of(model: LlamaForCausalLM, model_config: LlamaConfig, config: Config) -> Flops:
    """FLOPs of one token for a model with its adapters and its trainable parameters marked.

    The cost of type 6's blocks is averaged over the cycle of operators; LoRA's product ``B A``, made once for each use of
    a layer, is shared by the tokens of a micro-batch.
    """
    tokens = config.train.micro_batch_size * config.data.sequence_length
    linears = adapters = forward = 0.0
    for _, layer in decoder_linears(model):
        assert isinstance(layer, nn.Linear | AdapterLinear)
        product = 2.0 * layer.in_features * layer.out_features
        linears += product * (3 if layer.weight.requires_grad else 2)
        forward += product
        if isinstance(layer, AdapterLinear):
            in_forward, in_all = _adapter(layer, config, tokens)
            adapters += in_all
            forward += in_forward
    head = model.get_output_embeddings()
    attention = 4.0 * config.data.sequence_length * attention_widths(model_config)[0] * model_config.num_hidden_layers
    return Flops(
        linears=linears,
        adapters=adapters,
        attention=3 * attention,
        head=2.0 * head.weight.numel() * (3 if head.weight.requires_grad else 2),
        recomputed=forward + attention if config.model.activation_checkpointing else 0.0,
    )


def attention_widths(model_config: LlamaConfig) -> tuple[int, int]:
    """Features of all queries and of all keys (the values have as many) of one token."""
    head = model_config.head_dim or model_config.hidden_size // model_config.num_attention_heads
    return model_config.num_attention_heads * head, (
        model_config.num_key_value_heads or model_config.num_attention_heads
    ) * head


def _adapter(layer: AdapterLinear, config: Config, tokens: int) -> tuple[float, float]:
    """FLOPs of an adapter for one token: (forward, forward and backward)"""
    merged = layer.uses_merged_form(tokens)
    if isinstance(layer, MoRALinear):
        cycle = config.method.operators if config.merges else config.method.operators[:1]
        operators = [make_operator(kind, layer.in_features, layer.out_features, layer.square_size) for kind in cycle]
        blocks = sum(getattr(operator, "blocks", 1) for operator in operators) / len(operators)
        product = 2.0 * layer.square_size**2 * blocks
        # merged: only dM is a product of its own; decoupled: M C x, its input's gradient, dM
        return (0.0, product) if merged else (product, 3 * product)
    assert isinstance(layer, LoRALinear)
    product = 2.0 * layer.rank * (layer.in_features + layer.out_features)
    if not merged:
        return product, 3 * product
    build = (
        2.0 * layer.in_features * layer.out_features * layer.rank / tokens
    )  # W + B A, in forward and again in backward
    return build, 2 * build + 2 * product
