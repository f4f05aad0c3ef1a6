"""The work of a step, and the optimizer's state, computed from shapes; nothing is allocated.

The FLOPs of one token: only matrix products count, forward and backward together; a multiplication and an addition are
two FLOPs. A trained linear in -> out costs 6 in out: 2 forward, 2 for the input's gradient, 2 for the weight's. A
frozen one costs 4 in out. Attention counts the whole square of positions, as is usual (PaLM, arXiv 2204.02311, appendix
B), although kernels skip the masked half. The input's gradient is counted for every layer, including the first. The
operators' sums and copies, norms, rotary embeddings and the optimizer are memory traffic and are not counted.

The optimizer: if matrices have their own rule (``optim.matrices``, ``optim.others``), T counts their parameters, N the
ranks, and O the parameters of the matrices that the busiest rank updates: T / N, or the largest matrix if that is more,
as with embeddings and head on more than two ranks:

========  ============================================================================================================
state     4 bytes for each moment of an element: 8 with AdamW, 4 with Muon and NorMuon, which keeps 4 for each row too.
          GaLore, Fira and APOLLO with rank r keep 8 r l for a matrix with sides s <= l, and SUMO 4 r l; all but APOLLO
          keep 4 r s more for the projection. APOLLO-Mini has r = 1. 8-bit AdamW keeps 2 bytes for each element, and 8
          for each block of a row. At stages 1-3 a rank has 1 / N of the moments, and the rest for O
products  the rule's FLOPs for each matrix, on one rank; at stage 0 on every rank. The singular vectors that GaLore,
          Fira and SUMO compute once in ``optim.projection_every`` steps are left out, and so are those of momentum that
          SUMO computes in every step
exchange  stage 3: 4 T / N bytes of a rank's pieces go to the owners of the matrices, and 4 T / N come back. LoRA-Muon
          also sends the values of A and B, 4 T / N more. Stages 1 and 2 exchange matrices (LoRA-Muon: pairs) of more
          than T / N elements, and some at the borders between ranks, which are not counted
scratch   the whole matrices of a rank that were cut, 4 O, or 8 O with their values; and the rule's workspace for the
          matrices that it updates at once, with their copies if there are several, or what is sent and received, 4 T /
          N + 4 O, if that is more. Rules take turns. Cautious decay follows: 5 T / N, or at stage 0 5 bytes for each
          element of the largest matrix
========  ============================================================================================================
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.adapters.inject import decoder_linears, inject
from relora_mora.adapters.layers import AdapterLinear, adapter_layers, adapter_parameters
from relora_mora.config.optim import OptimConfig
from relora_mora.config.schema import Config, MethodConfig
from relora_mora.model.config import attention_widths
from relora_mora.model.llama import model_class
from relora_mora.optim.groups import group_of, matrix_rules, set_trainable, units_at_once, units_of
from relora_mora.optim.rules import PairRule, Rule, state_dtype
from relora_mora.sizing.setup import Setup

CAUTIOUS_BYTES = 26  # what the passes of cautious decay read and write for an element more than those of plain decay
Shapes = tuple[torch.Size, ...]  # of the matrices of a unit


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


def state_bytes(model: PreTrainedModel, optim: OptimConfig, ranks: int) -> float:
    """Bytes of optimizer state on the rank with the most of it, if ``ranks`` share it."""
    of_elements = sum(4 * numel * len(optim.of_group(group_of(name)).moments) for name, numel in _trained(model))
    of_matrices = (
        _largest_share([_kept_bytes(rule, shapes) for shapes in units], ranks)
        for rule, units in _units(model, optim).items()
    )
    return of_elements / ranks + sum(of_matrices)


def passes_bytes(model: PreTrainedModel, optim: OptimConfig) -> int:
    """Bytes that the element-wise passes of a step read and write over all ranks, except the weights for compute."""
    of_rules = optim.cautious_decay and optim.weight_decay > 0
    records = ((optim.of_group(group_of(name)), numel) for name, numel in _trained(model))
    return sum(
        numel * (record.bytes_per_element + CAUTIOUS_BYTES * (of_rules and record.rule is not None))
        for record, numel in records
    )


def product_flops(model: PreTrainedModel, optim: OptimConfig) -> float:
    """FLOPs of a step for all matrices, each counted once; 0 with AdamW."""
    return sum((rule.flops(*_sizes(shapes)) for rule, units in _units(model, optim).items() for shapes in units), 0.0)


def exchanged_bytes(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes that a rank gives to the exchanges of cut matrices in a step, averaged over the ranks."""
    every = _units(model, setup.config.optim).items()
    return sum(4 * (1 + _assembled(rule)) * sum(_cut_sizes(units, setup)) for rule, units in every) / setup.world_size


def scratch_bytes(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes of temporary memory while matrices are updated."""
    on_gpu = setup.on_gpu
    optim = setup.config.optim
    needed = [0.0]
    for rule, units in _units(model, optim).items():
        largest = 0.0
        for shapes in set(units):
            count = min(units.count(shapes), units_at_once(shapes, on_gpu=on_gpu))
            copied = 4 * _assembled(rule) * _numel(shapes) if count > 1 else 0
            largest = max(largest, count * (copied + rule.workspace_bytes(*_sizes(shapes), on_gpu=on_gpu)))
        cut = _cut_sizes(units, setup)
        whole = 4 * _largest_share(cut, setup.world_size)
        if optim.cautious_decay and optim.weight_decay:
            sizes = [_numel(shapes) for shapes in units]
            needed.append(5 * (sum(sizes) / setup.sharers if setup.stage else max(sizes)))
        needed.append(_assembled(rule) * whole + max(largest, 4 * sum(cut) / setup.world_size + whole))
    return max(needed)


def _assembled(rule: Rule) -> int:
    """How many tensors are exchanged for each matrix: its gradient, and its value if the rule needs that."""
    return 2 if isinstance(rule, PairRule) else 1


def _cut_sizes(units: Sequence[Shapes], setup: Setup) -> list[int]:
    """The elements of each of a rule's units that ZeRO is sure to cut."""
    sizes = [_numel(shapes) for shapes in units]
    partition = sum(sizes) / setup.sharers
    return sizes if setup.weight_sharers > 1 else [size for size in sizes if size > partition]


def _kept_bytes(rule: Rule, shapes: Shapes) -> int:
    """Bytes of a rule's state of one unit, without its moments."""
    return sum(
        math.prod(kept) * state_dtype(key).itemsize
        for shape in shapes
        for key, kept in rule.state_shapes(*shape).items()
    )


def _largest_share(sizes: Sequence[float], ranks: int) -> float:
    """The largest sum on a rank if ``ranks`` share things of these sizes, which cannot be divided."""
    return max([sum(sizes) / ranks, *sizes])


def _trained(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    return ((name, parameter.numel()) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _numel(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


def _sizes(shapes: Shapes) -> Iterator[int]:
    """What a rule's ``flops`` takes: rows and columns of a matrix, or r, in and out of a pair."""
    first, *others = shapes
    return itertools.chain(first, (rows for rows, _ in others))


def _units(model: PreTrainedModel, optim: OptimConfig) -> dict[Rule, list[Shapes]]:
    """The shapes of the units that each rule updates."""
    rules = matrix_rules(optim)
    adapters = adapter_parameters(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    names: dict[Rule, list[str]] = {}
    for name in shapes:
        group = group_of(name, adapters)
        if group in rules:
            names.setdefault(rules[group], []).append(name)
    return {
        rule: [tuple(shapes[name] for name in unit.names) for unit in units_of(rule, members, model)]
        for rule, members in names.items()
    }
