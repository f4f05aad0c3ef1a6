"""Arithmetic of one token, from the shapes of the layers.

Counted are the matrix products, a multiplication and an addition as two FLOPs; forward and backward together. A linear
in -> out that trains costs 6 in out: 2 forward, 2 for the input's gradient, 2 for the weight's. A frozen one costs
4 in out. Attention counts the whole square of positions, as is usual (PaLM, arXiv 2204.02311, appendix B), though
kernels skip the masked half. The input's gradient is counted for every layer, the first too. Sums and copies of the
operators, norms, rotary embeddings and the optimizer are memory traffic and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.adapters.inject import decoder_linears, inject
from relora_mora.adapters.layers import AdapterLinear
from relora_mora.config.schema import Config, MethodConfig
from relora_mora.model.config import attention_widths
from relora_mora.model.llama import model_class
from relora_mora.optim.groups import set_trainable


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


def meta_model(model_config: PreTrainedConfig, method: MethodConfig) -> PreTrainedModel:
    """The model with its adapters and its trainable parameters marked, without memory (on the meta device)."""
    with torch.device("meta"):
        model = model_class(model_config)(model_config)
        if method.uses_adapters:
            inject(model, method, seed=0)
    set_trainable(model, method)
    return model


def flops_per_token(model_config: PreTrainedConfig, config: Config) -> Flops:
    """FLOPs of one token in training with these settings; nothing is allocated."""
    return flops_of(meta_model(model_config, config.method), model_config, config)


def flops_of(model: PreTrainedModel, model_config: PreTrainedConfig, config: Config) -> Flops:
    """FLOPs of one token for a model with its adapters and its trainable parameters marked.

    The cost of type 6's blocks is averaged over the cycle of operators; LoRA's product ``B A``, made once for each use
    of a layer, is shared by the tokens of a micro-batch; of a resident layer it is made once a step and not counted.
    """
    tokens = config.tokens_per_micro_batch
    linears = adapters = forward = 0.0
    for _, layer in decoder_linears(model):
        product = 2.0 * layer.in_features * layer.out_features
        linears += product * (3 if layer.weight.requires_grad else 2)
        forward += product
        if isinstance(layer, AdapterLinear):
            flops = layer.flops(tokens, config.method.cycle)
            adapters += flops.both
            forward += flops.forward
    head = model.get_output_embeddings()
    attention = 4.0 * config.data.sequence_length * attention_widths(model_config)[0] * model_config.num_hidden_layers
    return Flops(
        linears=linears,
        adapters=adapters,
        attention=3 * attention,
        head=2.0 * head.weight.numel() * (3 if head.weight.requires_grad else 2),
        recomputed=forward + attention if config.model.activation_checkpointing else 0.0,
    )
