"""A run with an optimizer of whole matrices in plain torch, which the engine is compared with."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_layers, layer_generator
from relora_mora.config.schema import Config
from relora_mora.model.llama import LossModel, build_model
from relora_mora.optim.groups import group_rates, make_schedule, matrix_rules, parameter_groups, set_trainable
from tests.tools.tiny import batch, tiny_config, tiny_llama

STEPS = 7  # a merge after the fourth


OPTIM = {"matrices": "muon", "momentum": 0.8, "weight_decay": 0.1, "clip": 0.2, "lr": 2e-2, "lr_other": 1e-2}


def small_llama() -> Any:
    return tiny_llama(num_hidden_layers=3, intermediate_size=52)  # with two ranks, a border is inside a matrix


def matrix_config(world_size: int, stage: int, method: str, zero: dict[str, Any] | None = None, **optim: Any) -> Config:
    train = {"zero_stage": stage, "deepspeed": {"zero_optimization": zero or {}}}
    return tiny_config(world_size, method={"name": method, "rank": 5}, optim={**OPTIM, **optim}, train=train)


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of X <- a X + b X X^T X + c (X X^T)^2 X in float64."""
    x = matrix.double()
    norm = x.square().sum().sqrt()
    x = x / norm if norm > 0 else x
    for _ in range(5):
        cube = x @ x.T @ x
        x = 3.4445 * x - 4.775 * cube + 2.0315 * (x @ x.T @ cube)
    return x


class Reference:
    """The same run in plain torch: its losses and parameters."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.lm = build_model(small_llama(), seed=config.train.seed)
        if config.method.uses_adapters:
            inject(self.lm, config.method, seed=config.train.seed)
        set_trainable(self.lm, config.method)
        self.groups = parameter_groups(self.lm, config.optim)
        self.parameters = {name: p for name, p in self.lm.named_parameters() if p.requires_grad}
        rules = matrix_rules(config.optim)
        self.rules = {name: rules[each.name] for each in self.groups if each.name in rules for name in each.parameters}
        self.momentum = {name: torch.zeros_like(self.parameters[name]) for name in self.rules}
        self.others = [group for group in self.groups if group.parameters[0] not in self.momentum]
        self.adamw = torch.optim.AdamW(
            [
                {"params": [self.parameters[name] for name in group.parameters], "weight_decay": group.weight_decay}
                for group in self.others
            ],
            betas=config.optim.betas,
            eps=config.optim.eps,
        )
        self.schedule = make_schedule(config.method, config.optim, config.train.steps)
        self.module = LossModel(self.lm)

    def step(self, step: int) -> float:
        self.lm.zero_grad()
        loss = self.module(*batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.optim.clip)
        rates = dict(zip(self.groups, group_rates(self.schedule, self.groups, step), strict=True))
        for members, group in zip(self.adamw.param_groups, self.others, strict=True):
            members["lr"] = rates[group]
        self.adamw.step()
        for group, rate in rates.items():
            for name in set(group.parameters) & set(self.momentum):
                self._step_matrix(name, rate, group.weight_decay)
        return float(loss.detach())

    @torch.no_grad()
    def _step_matrix(self, name: str, rate: float, decay: float) -> None:
        weight = self.parameters[name]
        step = self._average(name)
        update = 0.2 * math.sqrt(max(weight.shape)) * orthogonal(step).float()
        weight -= rate * decay * weight + rate * update

    def _average(self, name: str) -> Tensor:
        """The momentum, after this step's gradient; with Nesterov's."""
        gradient = self.parameters[name].grad
        assert gradient is not None
        old = self.config.optim.momentum
        momentum = self.momentum[name] = old * self.momentum[name] + (1 - old) * gradient
        return old * momentum + (1 - old) * gradient if self.config.optim.nesterov else momentum

    @torch.no_grad()
    def merge(self, step: int) -> None:
        merges = self.schedule.merges_done(step)
        for name, layer in adapter_layers(self.lm):
            values = [getattr(layer, key) for key in layer.adapter_names]
            layer.weight += layer.delta_of(*values)
            generator = layer_generator(self.config.train.seed, name, merges)
            for key, value in zip(layer.adapter_names, values, strict=True):
                value.copy_(layer.fresh(key, generator))
                self.momentum[f"{name}.{key}"].zero_()
            if self.config.method.uses_squares:
                layer.set_operator(self.schedule.operator(step))


_Reference = TypeVar("_Reference", bound=Reference)


def losses_of(run: Any, merges: bool) -> list[float]:
    losses = []
    for step in range(1, STEPS + 1):
        loss = run.step(step)
        losses.append(loss if isinstance(loss, float) else loss[0])
        if merges and run.schedule.merge_after(step):
            run.merge(step)
    return losses


_finished: dict[tuple[type, str], tuple[Any, list[float]]] = {}


def reference_of(kind: type[_Reference], config: Config) -> tuple[_Reference, list[float]]:
    """A finished reference run with these settings, and its losses. Equal settings share one run."""
    key = (kind, config.model_dump_json())
    if key not in _finished:
        run = kind(config)
        _finished[key] = run, losses_of(run, config.method.merges)
    return _finished[key]


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest distance from the reference, relative to how far the reference is from ``start``."""
    assert found.keys() == expected.keys()
    distances = [
        torch.linalg.vector_norm(found[name] - expected[name])
        / torch.linalg.vector_norm(expected[name] - start.get(name, 0)).clamp(min=1e-12)
        for name in found
    ]
    return float(torch.stack(distances).max())  # Python's max would ignore NaN
