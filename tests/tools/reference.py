"""A run in plain torch, which the trainer is compared with: one process, float32, autograd through ``W + delta``."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from relora_mora.adapters.inject import choose_storage, inject
from relora_mora.adapters.layers import AdapterLinear, adapter_layers, layer_generator
from relora_mora.config.schema import Config
from relora_mora.model.causal import empty_model, initial_values
from relora_mora.model.config import read_model_config
from relora_mora.optim.groups import group_rates, make_schedule, matrix_rules, parameter_groups, set_trainable
from relora_mora.optim.rules import MatrixState, shapes_of
from relora_mora.system.seeds import derived_seed

Tokens = tuple[Tensor, Tensor]  # input_ids and labels [B, T] of a global batch


def orthogonal(matrix: Tensor) -> Tensor:
    """Muon's five steps of X <- a X + b X X^T X + c (X X^T)^2 X, in float64."""
    x = matrix.double()
    norm = x.square().sum().sqrt()
    x = x / norm if norm > 0 else x
    for _ in range(5):
        cube = x @ x.T @ x
        x = 3.4445 * x - 4.775 * cube + 2.0315 * (x @ x.T @ cube)
    return x


class PlainRun:
    """``train(batches)`` returns the loss of each step; ``parameters`` then has all values."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.method = config.method
        seed = config.train.seed
        lm = self.lm = AutoModelForCausalLM.from_config(read_model_config(config.model), attn_implementation="eager")
        with torch.no_grad():
            values = initial_values(
                empty_model(read_model_config(config.model)), [name for name, _ in lm.named_parameters()], seed
            )
            for name, parameter in lm.named_parameters():
                parameter.copy_(values[name])
        if self.method.uses_adapters:
            inject(lm, self.method, seed=seed)
            choose_storage(lm, self.method, on_gpu=False)
        set_trainable(lm, self.method)
        self.layers = dict(adapter_layers(lm))
        for layer in self.layers.values():
            layer.forward = _plain_forward(layer)
        self.parameters = {name: p for name, p in lm.named_parameters() if p.requires_grad}
        self.groups = parameter_groups(lm, config.optim)
        self.schedule = make_schedule(self.method, config.optim, config.train.steps)
        rules = matrix_rules(config.optim)
        self.rules = {name: rules[each.name] for each in self.groups if each.name in rules for name in each.parameters}
        self.moments: dict[str, dict[str, Tensor]] = {}
        self.updates: dict[str, int] = {}
        self.states: dict[str, MatrixState] = {}
        self._forget(self.parameters)

    def _forget(self, names: Iterable[str]) -> None:
        """The state of an optimizer that has made no step."""
        for name in names:
            value = self.parameters[name]
            self.updates[name] = 0
            self.moments[name] = {key: torch.zeros_like(value) for key in ("exp_avg", "exp_avg_sq")}
            if name in self.rules:
                self.moments[name] = {"momentum": torch.zeros_like(value)}
                shapes = shapes_of(self.rules[name], *value.shape)
                self.states[name] = MatrixState(derived_seed(self.config.train.seed, name), shapes)

    def train(self, batches: Sequence[Tokens]) -> list[float]:
        losses = []
        for step, batch in enumerate(batches, 1):
            losses.append(self.step(step, *batch))
            if self.method.merges and self.schedule.merge_after(step):
                self.merge(step)
        return losses

    def step(self, step: int, ids: Tensor, labels: Tensor) -> float:
        self.lm.zero_grad()
        logits = self.lm(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.optim.clip)
        for group, rate in zip(self.groups, group_rates(self.schedule, self.groups, step), strict=True):
            for name in group.parameters:
                self._update(name, rate, group.weight_decay)
        return float(loss.detach())

    @torch.no_grad()
    def _update(self, name: str, rate: float, decay: float) -> None:
        weight, gradient = self.parameters[name], self.parameters[name].grad
        assert gradient is not None
        weight *= 1 - rate * decay
        if name not in self.rules:
            weight -= rate * self._adam(name, gradient)
        elif self.config.optim.matrices == "muon" and len(self.states[name]) == 0:
            weight -= rate * 0.2 * math.sqrt(max(weight.shape)) * orthogonal(self._momentum(name, gradient))
        else:  # tests/optim compares these rules with their formulas
            weight -= rate * self.rules[name].update(gradient.clone(), self.states[name])

    def _adam(self, name: str, gradient: Tensor) -> Tensor:
        (first, second), moments = self.config.optim.betas, self.moments[name]
        count = self.updates[name] = self.updates[name] + 1
        average = moments["exp_avg"] = first * moments["exp_avg"] + (1 - first) * gradient
        square = moments["exp_avg_sq"] = second * moments["exp_avg_sq"] + (1 - second) * gradient**2
        root = (square / (1 - second**count)).sqrt()
        return average / (1 - first**count) / (root + self.config.optim.eps)

    def _momentum(self, name: str, gradient: Tensor) -> Tensor:
        """The momentum with this step's gradient; with Nesterov's."""
        old = self.config.optim.momentum
        momentum = self.moments[name]["momentum"] = old * self.moments[name]["momentum"] + (1 - old) * gradient
        return old * momentum + (1 - old) * gradient if self.config.optim.nesterov else momentum

    @torch.no_grad()
    def merge(self, step: int) -> None:
        merges = self.schedule.merges_done(step)
        for name, layer in self.layers.items():
            values = [getattr(layer, key) for key in layer.adapter_names]
            layer.base_weight.add_(layer.delta_of(*values))
            before = layer.operator if self.method.uses_squares else None
            generator = layer_generator(self.config.train.seed, name, merges)
            for key, value in zip(layer.adapter_names, values, strict=True):
                value.copy_(layer.fresh(key, generator))
            if self.method.uses_squares:
                layer.set_operator(self.schedule.operator(step))
            for key in layer.adapter_names:
                self._reset(name, f"{name}.{key}", merges, layer, before)

    def _reset(self, layer_name: str, name: str, merges: int, layer: AdapterLinear, before: Any) -> None:
        moments, mode = self.moments[name], self.method.reset
        if mode == "full":
            self._forget([name])
        elif mode == "carry":
            self.moments[name] = {key: layer.operator.carry(value, before) for key, value in moments.items()}
        elif mode in ("magnitude", "random"):
            first = next(iter(moments.values()))
            generator = layer_generator(self.config.train.seed, f"{layer_name}/{name}/exp_avg", merges)
            order = torch.randperm(first.numel(), generator=generator)
            if mode == "magnitude":
                order = first.abs().flatten().argsort()
            dropped = order[: round(self.method.reset_ratio * first.numel())]
            for value in moments.values():
                value.view(-1)[dropped] = 0


def _plain_forward(layer: AdapterLinear) -> Any:
    def forward(x: Tensor) -> Tensor:
        weight = layer.stored.dense(layer.stored.encode(layer.base_weight), torch.float32)
        return F.linear(x, weight + layer.delta_of(*(getattr(layer, key) for key in layer.adapter_names)), layer.bias)

    return forward
