"""The groups of an optimizer, and the trainer's learning rates for the schedulers of torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from relora_mora.adapters.layers import ADAPTERS, adapter_layers, adapter_parameters
from relora_mora.config.registry import ScheduleKind
from relora_mora.schedule import Schedule
from relora_mora.system.logs import log


@dataclass(frozen=True, kw_only=True)
class Rewarmed(Schedule):
    """A schedule whose envelope is the rate of somebody else, ``curve(step - 1)``."""

    curve: Callable[[int], float]

    def envelope(self, step: int) -> float:
        return self.curve(step - 1)


def rate_of_step(clock: Schedule, *, rewarm: bool) -> Callable[[int], float]:
    """What a ``LambdaLR`` calls with the number of steps done: the multiplier of the next step."""
    return lambda done: clock.rate(done + 1, rewarm=rewarm)


def check_rates(clock: Schedule) -> None:
    """Raises ValueError with the name of the argument, what was given, and what is possible."""
    total = clock.total_steps
    warmup = clock.warmup_steps
    every = clock.merge_every
    if clock.kind not in get_args(ScheduleKind):
        raise ValueError(f"kind: expected one of {', '.join(get_args(ScheduleKind))}, got {clock.kind!r}")
    if not 0 <= warmup < total:
        raise ValueError(f"warmup_steps: expected 0 to total_steps - 1 = {total - 1}, got {warmup}")
    if not 0 <= clock.min_ratio <= 1:
        raise ValueError(f"min_ratio: expected 0 to 1, got {clock.min_ratio}")
    if clock.kind == "wsd" and not 0 < clock.decay_steps <= total - warmup:
        raise ValueError(f"decay_steps: wsd needs 1 to {total - warmup} steps, got {clock.decay_steps}")
    if every >= total:
        log.warning("merge_every: %d means no merge in %d steps", every, total)
    if every and not 0 <= clock.restart_warmup_steps <= every:
        raise ValueError(f"restart_warmup_steps: expected 0 to merge_every = {every}, got {clock.restart_warmup_steps}")
    if clock.restart_warmup_steps and every < min(warmup, total):
        raise ValueError(
            f"merge_every: the first merge (step {every}) comes before the warmup ends (step {warmup}); raise it, or "
            "use restart_warmup_steps=0"
        )


def optimizer_groups(model: nn.Module, lr: float, lr_other: float, weight_decay: float) -> list[dict[str, Any]]:
    """See :meth:`relora_mora.library.attached.AttachedAdapters.parameter_groups`."""
    adapters = adapter_parameters(model)
    frozen = [f"{name}.weight" for name, layer in adapter_layers(model) if layer.base_weight.requires_grad]
    if frozen:
        raise ValueError(
            f"{len(frozen)} weights of adapter layers ({frozen[0]}, ...) require gradients, but they are frozen "
            "between merges; call requires_grad_() of the model before attach()"
        )
    groups: dict[str, list[nn.Parameter]] = {ADAPTERS: [], "matrices": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = ADAPTERS if name in adapters else "matrices" if parameter.dim() > 1 else "vectors"
            groups[kind].append(parameter)
    return [
        {
            "name": kind,
            "params": parameters,
            "lr": lr if kind == ADAPTERS else lr_other,
            "weight_decay": 0.0 if kind == "vectors" else weight_decay,
        }
        for kind, parameters in groups.items()
        if parameters
    ]


def rewarming_groups(optimizer: torch.optim.Optimizer, rewarm: str, model: nn.Module) -> list[bool]:
    """Which groups of the optimizer warm up after a merge; raises ValueError if it has no group of adapters."""
    if rewarm not in ("all", "adapters"):
        raise ValueError(f"rewarm: expected all or adapters, got {rewarm!r}")
    if rewarm == "all":
        return [True for _ in optimizer.param_groups]
    adapters = {id(model.get_parameter(name)) for name in adapter_parameters(model)}
    groups = [  # DeepSpeed puts flat tensors in place of the parameters, but keeps the names of groups
        group.get("name") == ADAPTERS or any(id(parameter) in adapters for parameter in group["params"])
        for group in optimizer.param_groups
    ]
    if not any(groups):
        raise ValueError("rewarm: no group of the optimizer has adapters; make it from parameter_groups()")
    return groups
