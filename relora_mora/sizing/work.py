"""The work of a step, and the optimizer's state, computed from shapes; nothing is allocated.

The FLOPs of one token: only matrix products count, forward and backward together; a multiplication and an addition are
two FLOPs. A trained linear in -> out costs 6 in out: 2 forward, 2 for the input's gradient, 2 for the weight's. A
frozen one costs 4 in out. Attention counts the whole square of positions, as is usual (PaLM, arXiv 2204.02311, appendix
B), although kernels skip the masked half. The input's gradient is counted for every layer, including the first. The
operators' sums and copies, norms, rotary embeddings and the optimizer are memory traffic and are not counted.

The optimizer: if matrices have their own rule (``optim.matrices``), T counts their parameters and N the ranks:

========  ============================================================================================================
state     4 bytes for each moment of an element: 8 with AdamW, 4 with Muon. GaLore, Fira and APOLLO with rank r keep
          8 r l for a matrix with sides s <= l; GaLore and Fira keep 4 r s more for the projection. At stages 1-3 a rank
          has 1 / N of it, as if matrices were shared evenly
products  the rule's FLOPs for each matrix, on one rank; at stage 0 on every rank. The singular vectors that GaLore and
          Fira compute once in ``optim.projection_every`` steps are left out
exchange  stage 3: 4 T / N bytes of a rank's pieces go to the owners of the matrices, and 4 T / N come back. Stages 1
          and 2 exchange only the matrices at the borders between ranks, which are not counted
scratch   the rule's workspace for the matrices that it updates at once, and their copies if there are several;
          stage 3: what is sent, what is received, and the whole matrices of a rank, 12 T / N
========  ============================================================================================================
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.adapters.inject import decoder_linears, inject
from relora_mora.adapters.layers import AdapterLinear, adapter_layers
from relora_mora.config.schema import Config, MethodConfig, OptimConfig
from relora_mora.model.config import attention_widths
from relora_mora.model.llama import model_class
from relora_mora.optim.groups import is_matrix, matrices_at_once, matrix_rule, parameter_moments, set_trainable
from relora_mora.sizing.setup import Setup


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


def flops_in_8_bits(model: PreTrainedModel, config: Config) -> float:
    """FLOPs of one token in products with 8-bit weights: two, or three if activations are recomputed."""
    products = 3 if config.model.activation_checkpointing else 2
    weights = sum(layer.weight.numel() for _, layer in adapter_layers(model) if layer.stored.multiplies)
    return 2.0 * products * weights


ADAM_BYTES = 28  # reads master, both moments, gradient; writes master, both moments
RULE_BYTES = 44  # per element outside the products: momentum, Nesterov, decay and step, each in its own pass


def state_bytes(model: PreTrainedModel, optim: OptimConfig) -> int:
    """Bytes of optimizer state over all ranks; counted once at stage 0, where each rank has all of it."""
    rule = matrix_rule(optim)
    of_elements = sum(4 * numel * len(parameter_moments(name, optim.matrices)) for name, numel in _trained(model))
    kept = [] if rule is None else [shape for sizes in _matrices(model) for shape in rule.state_shapes(*sizes).values()]
    return of_elements + 4 * sum(map(math.prod, kept))


def passes_bytes(model: PreTrainedModel, optim: OptimConfig) -> int:
    """Bytes that the element-wise passes of a step read and write over all ranks, except the weights for compute."""
    of_matrices = ADAM_BYTES if matrix_rule(optim) is None else RULE_BYTES
    return sum(numel * (of_matrices if is_matrix(name) else ADAM_BYTES) for name, numel in _trained(model))


def product_flops(model: PreTrainedModel, optim: OptimConfig) -> float:
    """FLOPs of a step for all matrices, each counted once; 0 with AdamW."""
    rule = matrix_rule(optim)
    return 0.0 if rule is None else sum(rule.flops(*shape) for shape in _matrices(model))


def exchanged_bytes(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes that a rank gives to the exchanges of sharded matrices in a step."""
    if setup.weight_sharers == 1 or matrix_rule(setup.config.optim) is None:
        return 0
    return 8 * sum(shape.numel() for shape in _matrices(model)) / setup.world_size


def scratch_bytes(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes of temporary memory while matrices are updated."""
    on_gpu = setup.on_gpu
    rule = matrix_rule(setup.config.optim)
    if rule is None:
        return 0
    shapes = list(_matrices(model))
    largest = 0
    for shape in set(shapes):
        count = min(shapes.count(shape), matrices_at_once(shape, on_gpu=on_gpu))
        copied = 4 * shape.numel() if count > 1 else 0
        largest = max(largest, count * (copied + rule.workspace_bytes(*shape, on_gpu=on_gpu)))
    return largest + 1.5 * exchanged_bytes(model, setup)


def _trained(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    return ((name, parameter.numel()) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _matrices(model: PreTrainedModel) -> Iterator[torch.Size]:
    named = model.named_parameters()
    return (parameter.shape for name, parameter in named if parameter.requires_grad and is_matrix(name))
