"""What the library cannot do is one error that says what was given, what was expected, and what to do."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import relora_mora as rm
from relora_mora.adapters.layers import adapter_layers
from tests.tools.each import each
from tests.tools.small import adamw, merging, mlp, steps


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: it computes with other weights than it has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight * 16).round() / 16, self.bias)


class LinearWithScale(nn.Linear):
    """It computes as nn.Linear does, until its scale trains."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda *given: None)
    return model


def shared() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


@each(
    ("model", "targets", "words"),
    [
        (nn.Sequential(Linear4bit(8, 8)), None, ("0 (Linear4bit)", "quantized", "load the model without")),
        (nn.Sequential(LinearWithScale(8, 8)), None, ("0 (LinearWithScale)", "load the model without")),
        (shared(), None, ("0 (Linear)", "shared with another module")),
        (mlp(), ["q_proj", "2"], ("matches q_proj", "0, 2")),
        (mlp(), ["1"], ("1 (GELU)", "not an nn.Linear")),
        (mlp().double(), None, ("torch.float64", "float32, bfloat16 and float16")),
        (nn.Sequential(nn.Linear(8, 8, device="meta")), None, ("meta device", "load the weights first")),
        (nn.Linear(8, 8), None, ("it is the whole model; put it into",)),
        (mlp(), [], ("no module that matches []", "0, 2")),
        (hooked(), None, ("its hooks, or a forward of its own, would be lost",)),
    ],
)
def test_targets_that_cannot_have_an_adapter(model: nn.Module, targets: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as refusal:
        rm.attach(model, rm.ReMoRA(2), targets=targets)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert not list(adapter_layers(model))


@each(
    ("method", "settings", "words"),
    [
        (rm.ReMoRA, {"operators": (1, 6)}, ("6", "even")),
        (rm.ReMoRA, {"square_size": 8, "rank_pattern": {"q_proj": 4}}, ("rank_pattern: square_size is R of every",)),
        (rm.LoRA, {"rank": 0}, ("rank", "0")),
        (rm.LoRA, {"form": "resident"}, ("resident", "decoupled")),
        (rm.ReMoRA, {"merge_evry": 1}, ("ReMoRA", "no setting merge_evry; did you mean merge_every")),
        (rm.LoRA, {"merge_every": 1}, ("its settings are rank, alpha",)),
    ],
)
def test_settings_of_methods(method: Any, settings: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises((ValueError, TypeError)) as refusal:
        method(**settings)
    assert all(word in str(refusal.value) for word in words), refusal.value


def _trains_everything() -> rm.AttachedAdapters:
    remora = merging()
    remora.model.requires_grad_(True)
    return remora


def _rewarmed(remora: rm.AttachedAdapters) -> None:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adamw(remora), 10)
    remora.rewarm(scheduler, total_steps=10, restart_warmup_steps=1)


def _without_adapters(remora: rm.AttachedAdapters) -> None:
    optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    remora.schedule(optimizer, total_steps=10, warmup_steps=0, rewarm="adapters")


@each(
    ("call", "message"),
    [
        (lambda: rm.attach(mlp(), rm.ReMoRA), "method: expected what ReMoRA"),
        (lambda: rm.attach(mlp(), rm.ReMoRA(2, rank_pattern={"q": 4})), "rank_pattern: no target is named q; .* 0, 2"),
        (lambda: rm.attach(merging().model, rm.ReMoRA(2)), r"has adapters already; attach\(\) once"),
        (lambda: merging(square_multiple=64), r"64 is more than R of a 16 -> 24 layer at method.rank=2; lower it"),
        (
            lambda: merging(rank=30),
            "method.rank: the adapters have 2,312 parameters, more than the 768 of their weights",
        ),
        (lambda: rm.attach(mlp(), rm.LoRA(99)), "method.rank: the adapters have 7,920 parameters, more than the 768"),
        (lambda: merging(square_size=26), r"method.square_size: R of 26 is larger than both widths of 0 \(16, 24\)"),
        (lambda: _trains_everything().parameter_groups(0.1), r"2 weights .*\(0.weight, ...\) require gradients"),
        (lambda: merging().after_step(None), "needs the optimizer that trains the model, got None"),
        (lambda: _rewarmed(merging()), r"needs a LambdaLR, got CosineAnnealingLR; use schedule\(\)"),
        (lambda: _without_adapters(merging()), r"rewarm: no group of the .* has adapters; .*parameter_groups\(\)"),
        (lambda: merging().load(Path("nowhere")), r"remora.safetensors: there is no state of the adapters"),
        (lambda: merging().model[0]._replicate_for_data_parallel(), r"nn.DataParallel .* use DistributedDataParallel"),
    ],
)
def test_calls_that_do_not_fit(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=message):
        call()


SCHEDULE = {"total_steps": 40, "warmup_steps": 4, "restart_warmup_steps": 2}


@each(
    ("changes", "message"),
    [
        ({"kind": "cosin"}, "kind: expected one of cosine, linear, wsd, constant, got 'cosin'"),
        ({"warmup_steps": 40}, "warmup_steps: expected 0 to total_steps - 1 = 39, got 40"),
        ({"min_ratio": -3}, "min_ratio: expected 0 to 1, got -3"),
        ({"kind": "wsd"}, "decay_steps: wsd needs 1 to 36 steps, got 0"),
        ({"rewarm": "adapter"}, "rewarm: expected all or adapters, got 'adapter'"),
        ({"restart_warmup_steps": 11}, "restart_warmup_steps: expected 0 to merge_every = 10, got 11"),
        ({"warmup_steps": 12}, r"the first merge \(step 10\) comes before the warmup ends \(step 12\)"),
    ],
)
def test_schedules_that_are_refused(changes: dict[str, Any], message: str) -> None:
    remora = merging(10)
    with pytest.raises(ValueError, match=message):
        remora.schedule(adamw(remora), **{**SCHEDULE, **changes})
    remora.schedule(adamw(remora), **SCHEDULE)


class CountsPerGroup(torch.optim.SGD):
    """Like apex's FusedAdam, it keeps the number of steps in the group."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        return super().step(closure)


class Packed(torch.Tensor):
    """As torchao's moments in 8 bits: it can do little of what a tensor can do."""

    def zero_(self) -> torch.Tensor:
        raise NotImplementedError


class Packs(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    moments = torch.ones_like(parameter).detach().as_subclass(Packed)
                    self.state[parameter] = {"step": torch.ones(()), "exp_avg": moments}
        return super().step(closure)


Make = Callable[[rm.AttachedAdapters], Any]


def trained(remora: rm.AttachedAdapters) -> list[nn.Parameter]:
    return [parameter for parameter in remora.model.parameters() if parameter.requires_grad]


@each(
    ("make", "reset", "message"),
    [
        (lambda it: torch.optim.AdamW(mlp().parameters()), "full", r"AdamW does not train 2 of 2 .*after attach\(\)"),
        (lambda it: torch.optim.LBFGS(trained(it)), "full", "LBFGS does not keep the state of each parameter"),
        (lambda it: torch.optim.Adafactor(it.parameter_groups(1e-2)), "full", None),
        (lambda it: torch.optim.Adafactor(it.parameter_groups(1e-2)), "random", "keeps 'row_var'.*use reset='full'"),
        (lambda it: CountsPerGroup(trained(it), lr=0.1), "full", r"keeps one step count .*parameter_groups\(\)"),
        (lambda it: Packs(it.parameter_groups(0.1)), "random", "Packs keeps 'exp_avg' of 0.mora_M, which has no value"),
        (lambda it: torch.optim.SGD(it.parameter_groups(0.1)), "magnitude", None),
        (lambda it: torch.optim.SGD(it.parameter_groups(0.1)), "random", None),
    ],
)
def test_the_first_step_says_whether_an_optimizer_can_be_reset(make: Make, reset: Any, message: str | None) -> None:
    remora = merging(3, reset=reset)
    if message is None:
        steps(remora, make(remora), 7)
        assert remora.merges_done == 2
        return
    with pytest.raises(ValueError, match=message):
        steps(remora, make(remora), 1)


def test_a_merge_resets_the_step_count_of_a_group() -> None:
    remora = merging()
    optimizer = CountsPerGroup(remora.parameter_groups(lr=0.02), momentum=0.9)
    steps(remora, optimizer, 3)
    assert {group["name"]: group["step"] for group in optimizer.param_groups} == {"adapters": 1, "vectors": 3}


def test_state_that_packs_its_values_starts_again() -> None:
    remora = merging()
    optimizer = Packs(remora.parameter_groups(lr=0.02))
    steps(remora, optimizer, 2)
    assert not any(optimizer.state.get(remora.model.get_parameter(name)) for name in remora.names)
    steps(remora, optimizer, 3)


OURS: dict[str, Any] = {"method": rm.ReMoRA(2, merge_every=3)}


@each(
    ("theirs", "words"),
    [
        ({"method": rm.ReLoRA(2, merge_every=3)}, "method is 'remora', expected 'relora'"),
        ({"seed": 1}, "seed is 0, expected 1"),
        ({"method": rm.ReMoRA(2, merge_every=2)}, "merge_every is 3, expected 2"),
        ({"method": rm.ReMoRA(3, merge_every=3)}, "rank is 2, expected 3"),
        ({"method": rm.ReMoRA(2, merge_every=3, merge_until_step=2)}, "merges_done is 1, expected 0"),
        ({"method": rm.ReLoRA(2, merge_every=3, alpha=64)}, "alpha is None, expected 64.0"),
        ({"targets": ["2"]}, "targets is ['0', '2'], expected ['2']"),
        ({"model": mlp().bfloat16()}, "dtypes is ['torch.float32'], expected ['torch.bfloat16']"),
    ],
)
def test_the_state_of_another_course(theirs: dict[str, Any], words: str, tmp_path: Path) -> None:
    remora = rm.attach(mlp(), **OURS)
    steps(remora, adamw(remora), 4)
    remora.save(tmp_path)
    other = rm.attach(**{"model": mlp(), **OURS, **theirs})
    for load in (lambda: other.load_state_dict(remora.state_dict()), lambda: other.load(tmp_path)):
        with pytest.raises(ValueError, match=f"{re.escape(words)}.*call attach"):
            load()
    assert other.step == 0


def test_a_state_that_is_not_whole() -> None:
    remora = rm.attach(mlp().bfloat16(), rm.ReMoRA(2, merge_every=2))
    steps(remora, adamw(remora), 3)
    with pytest.raises(ValueError, match="float32 values of 0 frozen weights, and the model needs them of 2"):
        remora.load_state_dict({**remora.state_dict(), "base": {}})
    with pytest.raises(ValueError, match=r"not a state of adapters of this release: it has no .*base, .*merges_done"):
        remora.load_state_dict({"step": 1, "seed": 0, "method": "remora", "operator": 1})
