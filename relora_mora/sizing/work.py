"""The optimizer's state and the work of its step, computed from shapes; nothing is allocated.

A rule for whole matrices (``optim.matrices``, ``optim.others``) updates each on one rank, at stage 0 on every rank. So
the rank with the largest matrix may have more than its share. ZeRO cuts matrices at borders between ranks, at stage 3
all of them: a step sends the pieces of a matrix to its owner, and 4 bytes of each element back.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_parameters
from relora_mora.config.optim import OptimConfig
from relora_mora.config.schema import MethodConfig
from relora_mora.model.causal import empty_model
from relora_mora.optim.groups import group_of, matrices_at_once, matrix_rules, set_trainable
from relora_mora.optim.rules import MatrixRule, shapes_of, state_dtype
from relora_mora.sizing.setup import Setup


def meta_model(model_config: PreTrainedConfig, method: MethodConfig) -> PreTrainedModel:
    """Builds the model with adapters and marked trainable parameters on the meta device, which takes no memory."""
    model = empty_model(model_config)
    if method.uses_adapters:
        with torch.device("meta"):
            inject(model, method, seed=0)
    set_trainable(model, method)
    return model


def state_bytes(model: PreTrainedModel, optim: OptimConfig, ranks: int) -> float:
    """Bytes of optimizer state on the rank with the most of it, if ``ranks`` share it."""
    of_elements = sum(4 * numel * len(optim.of_group(group).moments) for group, numel in _trained(model))
    of_matrices = (
        _largest_share([_kept_bytes(rule, shape) for shape in shapes], ranks)
        for rule, shapes in _matrices(model, optim).items()
    )
    return of_elements / ranks + sum(of_matrices)


def passes_bytes(model: PreTrainedModel, optim: OptimConfig) -> int:
    """Bytes that the element-wise passes of a step read and write over all ranks, except the weights for compute."""
    return sum(numel * optim.of_group(group).bytes_per_element for group, numel in _trained(model))


def product_flops(model: PreTrainedModel, optim: OptimConfig) -> float:
    """FLOPs of a step for all matrices, each counted once; 0 with AdamW."""
    return sum((rule.flops(*shape) for rule, shapes in _matrices(model, optim).items() for shape in shapes), 0.0)


def exchanged_bytes(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes that a rank gives to the exchanges of cut matrices in a step, averaged over the ranks.

    Below stage 3, matrices that are cut only because they are at a border are not counted.
    """
    every = _matrices(model, setup.config.optim).values()
    return sum(8 * sum(_cut_sizes(shapes, setup)) for shapes in every) / setup.world_size


def scratch_bytes(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes of temporary memory while matrices are updated: those that were cut, now whole, and the largest of the
    rules' workspaces or of what is sent and received."""
    needed = [0.0]
    for rule, shapes in _matrices(model, setup.config.optim).items():
        workspaces = []
        for shape in set(shapes):
            count = min(shapes.count(shape), matrices_at_once(shape, on_gpu=setup.on_gpu))
            copied = 4 * shape.numel() if count > 1 else 0
            workspaces.append(count * (copied + rule.workspace_bytes(*shape, on_gpu=setup.on_gpu)))
        cut = _cut_sizes(shapes, setup)
        whole = 4 * _largest_share(cut, setup.world_size)
        needed.append(whole + max(*workspaces, 4 * sum(cut) / setup.world_size + whole))
    return max(needed)


def _cut_sizes(shapes: Sequence[torch.Size], setup: Setup) -> list[int]:
    """The elements of each of a rule's matrices that ZeRO is sure to cut."""
    sizes = [shape.numel() for shape in shapes]
    partition = sum(sizes) / setup.sharers
    return sizes if setup.weight_sharers > 1 else [size for size in sizes if size > partition]


def _kept_bytes(rule: MatrixRule, shape: torch.Size) -> int:
    """Bytes of a rule's state of one matrix, without its moments."""
    return sum(math.prod(kept) * state_dtype(key).itemsize for key, kept in shapes_of(rule, *shape).items())


def _largest_share(sizes: Sequence[float], ranks: int) -> float:
    """The largest sum on a rank if ``ranks`` share things of these sizes, which cannot be divided."""
    return max([sum(sizes) / ranks, *sizes])


def _trained(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """The group and size of each parameter that trains; a matrix of an adapter counts as one of a linear."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return ((group_of(name, p.shape), p.numel()) for name, p in trained)


def _matrices(model: PreTrainedModel, optim: OptimConfig) -> dict[MatrixRule, list[torch.Size]]:
    """The shapes of the matrices that each rule updates."""
    rules = matrix_rules(optim)
    adapters = adapter_parameters(model)
    shapes: dict[MatrixRule, list[torch.Size]] = {}
    for name, parameter in model.named_parameters():
        group = group_of(name, parameter.shape, adapters)
        if parameter.requires_grad and group in rules:
            shapes.setdefault(rules[group], []).append(parameter.shape)
    return shapes
