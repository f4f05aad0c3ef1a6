"""Parameter groups and their optimizer: which parameters train, with which rule, and at which rate."""

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora_mora.adapters.inject import decoder_layers, decoder_linears
from relora_mora.adapters.layers import ADAPTERS, adapter_layers, adapter_parameters
from relora_mora.config.lengths import restart_warmup
from relora_mora.config.optim import OptimConfig
from relora_mora.config.schema import MethodConfig
from relora_mora.optim.own import own_rule
from relora_mora.optim.rules import MatrixRule, MatrixState
from relora_mora.schedule import Schedule

GROUPS = (ADAPTERS, "linears", "embeddings", "norms")
IN_LAYER = re.compile(r"\.\d+\.")  # the number of a layer in a name
GPU_BATCH = 2**22  # elements that a rule updates together


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. ``total`` counts the model without adapters; ``trainable`` includes the adapters."""

    total: int
    trainable: int
    adapters: int
    frozen: int


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a rate and the kind of optimizer state. A merge resets ``adapters``."""

    name: str  # one of GROUPS
    parameters: tuple[str, ...]
    peak_lr: float
    weight_decay: float
    rewarms: bool


# Replaces every matrix in the gradients (by flat tensor) with its update; a collective. The second argument gets stacks
# [k, m, n] of matrices, with their names. Each matrix is updated on one rank, its owner.
ReplaceMatrices = Callable[[Mapping[Tensor, Tensor], Callable[[Tensor, Sequence[str]], Tensor]], None]


def create_state(optimizer: torch.optim.Optimizer, flat: Tensor, moments: Iterable[str]) -> dict[str, Tensor]:
    """The moments of a flat tensor and Adam's ``step`` count; creates zeros for those that do not exist yet."""
    state: dict[str, Tensor] = optimizer.state[flat]
    for key in moments:
        if key not in state:
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
    return state


def set_trainable(model: PreTrainedModel, method: MethodConfig) -> None:
    """Sets ``requires_grad`` of adapters, other linears, embeddings, norms and head as the settings say."""
    adapters = adapter_parameters(model)
    head = set(model.get_output_embeddings().parameters())
    tied = model.get_input_embeddings().weight in head
    of_group = {
        "adapters": True,
        "linears": method.trains_linears,
        "embeddings": method.train_embeddings is True or (tied and method.train_head),
        "norms": method.train_norms,
    }
    of_name = {f"{name}.weight": False for name, _ in adapter_layers(model)}
    if method.uses_adapters:
        of_name |= dict.fromkeys(expert_parameters(model), method.train_experts)
    of_parameter = {} if tied else dict.fromkeys(head, method.train_head)
    if method.trains_rows:
        of_parameter |= dict.fromkeys(end_weights(model), True)
    for name, parameter in model.named_parameters():
        trains = of_name.get(name, of_group[group_of(name, parameter.shape, adapters)])
        parameter.requires_grad_(of_parameter.get(parameter, trains))


def end_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights of embeddings and head, once if they are tied."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return list(dict.fromkeys(end.get_parameter("weight") for end in ends))


def keep_old_rows(model: PreTrainedModel, first: int) -> None:
    """Gives rows of embeddings and head before ``first`` no gradient, so that an optimizer without decay keeps them."""
    for weight in end_weights(model):
        weight.register_hook(lambda gradient: F.pad(gradient[first:], (0, 0, first, 0)))


def expert_parameters(model: nn.Module) -> set[str]:
    """The names of experts, routers and other parameters of decoder layers that are more than vectors of no linear."""
    linears = {f"{name}.weight" for name, _ in decoder_linears(model)} | adapter_parameters(model)
    inside = (
        (f"{layer_name}.{name}", parameter)
        for layer_name, layer in decoder_layers(model)
        for name, parameter in layer.named_parameters()
    )
    return {name for name, parameter in inside if parameter.dim() > 1 and name not in linears}


def adapted_share(model: nn.Module) -> float:
    """The share of the weights in matrices of decoder layers that are under adapters; 0.14 in a small Mixtral."""
    linears = sum(linear.in_features * linear.out_features for _, linear in decoder_linears(model))
    experts = sum(model.get_parameter(name).numel() for name in expert_parameters(model))
    under = sum(layer.in_features * layer.out_features for _, layer in adapter_layers(model))
    return under / max(1, linears + experts)


def parameter_groups(model: nn.Module, optim: OptimConfig, *, keeps_rows: bool = False) -> list[ParameterGroup]:
    """The groups of trainable parameters in a fixed order, without empty groups.

    With ``keeps_rows``, embeddings have no weight decay, which would move rows that have no gradient.

    If there are adapters, decoder linears that train without one have the rate ``optim.lr_other``.
    """
    other = optim.lr if optim.lr_other is None else optim.lr_other
    adapters = adapter_parameters(model)
    members: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[group_of(name, parameter.shape, adapters)].append(name)
    main = "adapters" if adapters else "linears"
    return [
        ParameterGroup(
            name=group,
            parameters=tuple(names),
            peak_lr=optim.lr if group == main else other,
            weight_decay=0.0 if group == "norms" or (keeps_rows and group == "embeddings") else optim.weight_decay,
            rewarms=optim.rewarm == "all" or group == "adapters",
        )
        for group, names in members.items()
        if names
    ]


class MatrixAdamW(torch.optim.AdamW):
    """AdamW, except that some groups step by a :class:`MatrixRule`: ``rules`` has their names.

    They do not step until ``matrices`` has what their rule steps, because DeepSpeed steps while it builds an engine.
    ``states`` holds, by name, the state of the matrices that this rank owns.
    """

    def __init__(self, groups: list[dict[str, Any]], rules: Mapping[str, MatrixRule], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.rules = rules
        self.matrices: dict[MatrixRule, ReplaceMatrices] = {}
        self.states: dict[str, MatrixState] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Steps all parameters that have gradients and overwrites the gradients of matrices; ignores ``closure``."""
        groups = self.param_groups
        for rule, replace in self.matrices.items():
            self._step_matrices(rule, replace, [group for group in groups if self.rules.get(group["name"]) is rule])
        self.param_groups = [group for group in groups if group["name"] not in self.rules]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_matrices(self, rule: MatrixRule, replace: ReplaceMatrices, groups: list[dict[str, Any]]) -> None:
        rates = {flat: group for group in groups for flat in group["params"] if flat.grad is not None}
        if not rates:
            return
        for flat, group in rates.items():
            rule.update_moments(flat.grad, create_state(self, flat, group["moments"]))

        def update(stack: Tensor, names: Sequence[str]) -> Tensor:
            return rule.update_stack(stack, [self.states[name] for name in names])

        replace({flat: flat.grad for flat in rates}, update)
        for flat, group in rates.items():
            if group["weight_decay"]:
                flat.mul_(1 - group["lr"] * group["weight_decay"])
            flat.add_(flat.grad, alpha=-group["lr"])


def matrix_rules(optim: OptimConfig) -> dict[str, MatrixRule]:
    """The rules of the groups whose optimizer has one. Groups with the same optimizer share the object."""
    names = {group: optim.of_group(group).rule for group in GROUPS}
    rules: dict[str, MatrixRule] = {
        name: own_rule(optim) if name == optim.matrices else resolve_name(name)(optim)
        for name in dict.fromkeys(names.values())
        if name is not None
    }
    return {group: rules[name] for group, name in names.items() if name is not None}


def matrices_at_once(shape: Sequence[int], *, on_gpu: bool) -> int:
    """How many matrices of a shape a rule updates together. On a GPU, launches dominate the time of a small one."""
    return max(1, GPU_BATCH // math.prod(shape)) if on_gpu else 1


def build_optimizer(model: nn.Module, groups: list[ParameterGroup], optim: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of the groups. Its rates are 0 because the trainer sets each group's rate before every step."""
    parameters = dict(model.named_parameters())
    members = [
        {
            "params": [parameters[name] for name in group.parameters],
            "weight_decay": group.weight_decay,
            "name": group.name,
            "moments": optim.of_group(group.name).moments,
        }
        for group in groups
    ]
    settings: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps, "fused": True}
    rules = matrix_rules(optim)
    return MatrixAdamW(members, rules, **settings) if rules else torch.optim.AdamW(members, **settings)


def group_rates(schedule: Schedule, groups: list[ParameterGroup], step: int) -> list[float]:
    """The rate of each group in step number ``step`` (the first is 1)."""
    return [group.peak_lr * schedule.rate(step, rewarm=group.rewarms) for group in groups]


def make_schedule(method: MethodConfig, optim: OptimConfig, steps: int) -> Schedule:
    """The clock of a run of ``steps`` optimizer steps."""
    return Schedule(
        kind=optim.schedule,
        total_steps=steps,
        warmup_steps=optim.warmup_of(steps),
        min_ratio=optim.min_ratio,
        decay_steps=optim.decay_of(steps),
        merge_every=method.merge_every if method.merges else 0,
        merge_until_step=method.merge_until_step,
        restart_warmup_steps=restart_warmup(method, optim),
        operators=method.cycle,
    )


def group_of(name: str, shape: Sequence[int], adapters: Container[str] = ()) -> str:
    """The group of a parameter by its name and shape: vectors are ``norms``, matrices outside of layers ``embeddings``.

    Without the names of ``adapters``, A, B and M count as ``linears``.
    """
    if name in adapters:
        return "adapters"
    if len(shape) < 2:
        return "norms"
    return "linears" if IN_LAYER.search(name) else "embeddings"


def count_parameters(model: nn.Module) -> Parameters:
    """Counts the parameters of a model after ``set_trainable``; its tensors may be on ``meta``."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    everything = sum(sizes.values())
    adapters = sum(sizes[name] for name in adapter_parameters(model))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Parameters(
        total=everything - adapters, trainable=trainable, adapters=adapters, frozen=everything - trainable
    )
