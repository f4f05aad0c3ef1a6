"""Parameter groups and AdamW: which parameters train, at which rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from relora_mora.config import MethodConfig, OptimConfig
from relora_mora.methods.layers import adapter_layers, adapter_parameters
from relora_mora.schedule import Schedule

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's running means, by the names of its state


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; ``total`` is the model's without adapters, ``trainable`` includes them."""

    total: int
    trainable: int
    adapters: int
    frozen: int


@dataclass(frozen=True)
class ParameterGroup:
    """One group of AdamW: parameter names and their peak rate. ``adapters`` is reset by a merge."""

    name: str  # adapters | linears | embeddings | norms
    parameters: tuple[str, ...]
    peak_lr: float
    weight_decay: float
    rewarms: bool


def set_trainable(model: PreTrainedModel, method: MethodConfig) -> None:
    """Marks what trains: adapters or linears, and embeddings, norms and head as the settings say."""
    adapters = {f"{name}.weight" for name, _ in adapter_layers(model)}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        kind = _kind(name)
        train = {
            "linears": name not in adapters,
            "embeddings": method.train_embeddings or (tied and method.train_head),
            "head": method.train_head,
            "norms": method.train_norms,
        }[kind]
        parameter.requires_grad_(train)


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[ParameterGroup]:
    """The groups of trainable parameters, in a fixed order; empty ones are left out.

    Linears of the decoder that have no adapter train in full, at ``optim.lr_other`` when the others have adapters.
    """
    other = optim.lr if optim.lr_other is None else optim.lr_other
    adapters = adapter_parameters(model)
    members: dict[str, list[str]] = {"adapters": [], "linears": [], "embeddings": [], "norms": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "adapters" if name in adapters else {"head": "embeddings"}.get(_kind(name), _kind(name))
            members[kind].append(name)
    main = "adapters" if adapters else "linears"
    return [
        ParameterGroup(
            name=kind,
            parameters=tuple(names),
            peak_lr=optim.lr if kind == main else other,
            weight_decay=0.0 if kind == "norms" else optim.weight_decay,
            rewarms=optim.rewarm == "all" or kind == main,
        )
        for kind, names in members.items()
        if names
    ]


def build_optimizer(model: nn.Module, groups: list[ParameterGroup], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups, built at rate 0: the trainer sets each group's rate before every step."""
    parameters = dict(model.named_parameters())
    return torch.optim.AdamW(
        [
            {
                "params": [parameters[name] for name in group.parameters],
                "weight_decay": group.weight_decay,
                "name": group.name,
            }
            for group in groups
        ],
        lr=0.0,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def group_rates(schedule: Schedule, groups: list[ParameterGroup], step: int) -> list[float]:
    """The rate of each group for step number ``step`` (the first is 1)."""
    return [group.peak_lr * schedule.rate(step, rewarm=group.rewarms) for group in groups]


def make_schedule(method: MethodConfig, optim: OptimConfig, steps: int) -> Schedule:
    """The clock of a run of ``steps`` optimizer steps."""
    return Schedule(
        kind=optim.schedule,
        total_steps=steps,
        warmup_steps=optim.warmup_steps,
        min_ratio=optim.min_ratio,
        decay_steps=optim.decay_steps or max(1, steps // 10),
        merge_every=method.merge_every if method.merges else 0,
        restart_warmup_steps=optim.restart_warmup_steps if method.merges else 0,
        operators=method.cycle,
    )


def _kind(name: str) -> str:
    """embeddings, head, norms or linears, by the names of transformers' LLaMA family"""
    if "embed_tokens" in name:
        return "embeddings"
    if name.startswith("lm_head"):
        return "head"
    if "norm" in name or name.endswith(".bias"):
        return "norms"
    return "linears"


def count_parameters(model: nn.Module) -> Parameters:
    """Counts a model whose parameters are marked (``set_trainable``); its tensors may be on ``meta``."""
    adapters = adapter_parameters(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    everything = sum(sizes.values())
    of_adapters = sum(sizes[name] for name in adapters)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Parameters(
        total=everything - of_adapters, trainable=trainable, adapters=of_adapters, frozen=everything - trainable
    )
