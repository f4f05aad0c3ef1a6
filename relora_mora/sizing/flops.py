"""The FLOPs of one token, from the shapes of the layers.

Only matrix products count, forward and backward together; a multiplication and an addition are two FLOPs. A trained
linear in -> out costs 6 in out: 2 forward, 2 for the input's gradient, 2 for the weight's. A frozen one costs 4 in out.
Attention counts the whole square of positions, as is usual (PaLM, arXiv 2204.02311, appendix B), although kernels skip
the masked half. The input's gradient is counted for every layer, including the first. The operators' sums and copies,
norms, rotary embeddings and the optimizer are memory traffic and are not counted.
"""

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

    ``recomputed`` is what activation checkpointing computes a second time. The devices do this work, but it does not
    belong to the model's arithmetic, so "model FLOPs utilisation" leaves it out.
    """

    linears: float
    adapters: float
    attention: float
    head: float
    recomputed: float

    @property
    def total(self) -> float:

        return self.linears + self.adapters + self.attention + self.head

    @property
    def performed(self) -> float:

        return self.total + self.recomputed


def meta_model(model_config: PreTrainedConfig, method: MethodConfig) -> PreTrainedModel:
    """Builds the model with adapters and marked trainable parameters on the meta device, which takes no memory."""
    with torch.device("meta"):
        model = model_class(model_config)(model_config)
        if method.uses_adapters:
            inject(model, method, seed=0)
    set_trainable(model, method)
    return model


def flops_per_token(model_config: PreTrainedConfig, config: Config) -> Flops:
    """FLOPs of one training token with these settings; allocates nothing."""
    return flops_of(meta_model(model_config, config.method), model_config, config)


def flops_of(model: PreTrainedModel, model_config: PreTrainedConfig, config: Config) -> Flops:
    """FLOPs of one token for a model that has its adapters and its trainable parameters marked.

    The cost of operator 6's blocks is averaged over the cycle of operators. LoRA's product ``B A`` is computed once for
    each use of a layer, so the tokens of a micro-batch share its cost. A resident layer computes it once a step; that
    is not counted.
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
