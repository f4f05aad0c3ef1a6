"""What the library cannot do is one ValueError that says what was given, what was expected, and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

import relora_mora as rm
from relora_mora.adapters.layers import adapter_layers
from tests.tools.each import each

METHOD = rm.ReMoRA(2, merge_every=3)


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


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda *given: None)
    return model


def quantized() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), Linear4bit(8, 8))


def shared() -> nn.Module:
    model = mlp()
    model[2].weight = model[0].weight
    return model


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return mlp()


@each(
    ("model", "targets", "words"),
    [
        (quantized(), None, ("1 (Linear4bit)", "quantized", "load the model without")),
        (nn.Sequential(LinearWithScale(8, 8)), None, ("0 (LinearWithScale)", "load the model without")),
        (nn.Sequential(orthogonal(nn.Linear(8, 8))), None, ("0 (ParametrizedLinear)", "parametrized")),
        (gpt2(), ["c_attn"], ("c_attn (Conv1D)", "not an nn.Linear")),
        (gpt2(), None, ("any nn.Linear", "lm_head")),
        (shared(), None, ("0 (Linear)", "shared with another module")),
        (mlp(), ["q_proj", "2"], ("matches q_proj", "0, 2")),
        (mlp(), r"layers\.\d+", (r"layers\.\d+", "0, 2")),
        (mlp(), ["1"], ("1 (GELU)", "not an nn.Linear")),
        (mlp().double(), None, ("torch.float64", "float32, bfloat16 and float16")),
        (on_meta(), None, ("meta device", "load the weights first")),
        (nn.Sequential(nn.GELU()), None, ("any nn.Linear", "(none)")),
        (nn.Linear(8, 8), None, ("it is the whole model; put it into",)),
        (mlp(), [], ("no module that matches []", "0, 2")),
        (hooked(), None, ("its hooks, or a forward of its own, would be lost",)),
    ],
)
def test_targets_that_cannot_have_an_adapter(model: nn.Module, targets: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as refusal:
        rm.attach(model, METHOD, targets=targets)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert not list(adapter_layers(model))


def test_methods_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="method: expected what ReMoRA"):
        rm.attach(mlp(), rm.ReMoRA)
    with pytest.raises(ValueError, match="rank_pattern: no target is named q_proj; they are 0, 2"):
        rm.attach(mlp(), rm.ReMoRA(2, rank_pattern={"q_proj": 4}))


def test_data_parallel() -> None:
    """Torch calls this of each module for each GPU."""
    model = mlp()
    rm.attach(model, METHOD)
    with pytest.raises(RuntimeError, match=r"nn.DataParallel does not .* use DistributedDataParallel"):
        model[0]._replicate_for_data_parallel()


def test_attaching_twice() -> None:
    model = mlp()
    rm.attach(model, METHOD)
    with pytest.raises(ValueError, match=r"has adapters already; attach\(\) once"):
        rm.attach(model, METHOD)


@each(
    ("method", "settings", "words"),
    [
        (rm.ReMoRA, {"operators": (1, 1)}, ("[1, 1]", "alternate")),
        (rm.ReMoRA, {"operators": (1, 5)}, ("5",)),
        (rm.ReMoRA, {"operators": (1, 6)}, ("6", "even")),
        (rm.ReMoRA, {"operators": (1, 6), "reset": "carry", "square_multiple": 2}, ("carry", "reset=full")),
        (rm.ReLoRA, {"reset": "carry"}, ("carry", "relora")),
        (rm.ReLoRA, {"merge_every": 0}, ("merge_every", "0")),
        (rm.LoRA, {"rank": 0}, ("rank", "0")),
        (rm.LoRA, {"form": "resident"}, ("resident", "decoupled")),
        (rm.LoRA, {"dropout": 0.1, "form": "merged"}, ("dropout", "auto")),
    ],
)
def test_settings_of_methods(method: Any, settings: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as refusal:
        method(**settings)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_setting_that_a_method_does_not_have() -> None:
    wrong: list[tuple[Any, str, str]] = [
        (rm.ReMoRA, "merge_evry", "ReMoRA.* no setting merge_evry; did you mean merge_every"),
        (rm.ReLoRA, "rst", "did you mean reset"),
        (rm.MoRA, "operators", "did you mean operator"),
        (rm.LoRA, "merge_every", "its settings are rank, alpha"),
    ]
    for method, name, message in wrong:
        with pytest.raises(TypeError, match=message):
            method(**{name: 1})


def test_a_layer_that_is_too_small() -> None:
    with pytest.raises(ValueError, match=r"64 is more than R of a 8 -> 8 layer at method.rank=2; lower it"):
        rm.attach(mlp(), rm.ReMoRA(2, square_multiple=64))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(torch.ones(2, 8)).square().mean()
        value.backward()
        return value

    optimizer.step(loss)


def test_an_optimizer_made_before_attach() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    remora = rm.attach(model, METHOD)
    step(model, optimizer)
    with pytest.raises(ValueError, match=r"AdamW does not train 2 of 2 .*after attach\(\).*parameter_groups\(\)"):
        remora.after_step(optimizer)


def test_no_group_of_adapters_to_warm_up_again() -> None:
    remora = rm.attach(mlp(), METHOD)
    optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=r"rewarm: no group of the optimizer has adapters; .*parameter_groups\(\)"):
        remora.schedule(optimizer, total_steps=10, warmup_steps=0, rewarm="adapters")


def test_ranks_by_name_next_to_a_size_for_all() -> None:
    with pytest.raises(ValueError, match="rank_pattern: square_size is R of every layer"):
        rm.ReMoRA(2, square_size=8, rank_pattern={"q_proj": 4})


def test_an_optimizer_with_one_state_for_all_parameters() -> None:
    model = mlp()
    remora = rm.attach(model, METHOD)
    optimizer = torch.optim.LBFGS([parameter for parameter in model.parameters() if parameter.requires_grad])
    step(model, optimizer)
    with pytest.raises(ValueError, match="LBFGS does not keep the state of each parameter"):
        remora.after_step(optimizer)


def test_state_that_has_no_value_per_element() -> None:
    """Adafactor keeps the moments of rows and columns; only a full reset starts them again."""
    for reset, refused in (("full", False), ("magnitude", True)):
        model = mlp()
        remora = rm.attach(model, rm.ReMoRA(2, merge_every=3, reset=reset))
        optimizer = torch.optim.Adafactor(remora.parameter_groups(lr=1e-2))
        step(model, optimizer)
        if not refused:
            remora.after_step(optimizer)
            continue
        with pytest.raises(ValueError, match=r"Adafactor keeps 'row_var'.*use reset='full'"):
            remora.after_step(optimizer)


def test_a_scheduler_that_cannot_warm_up_again() -> None:
    remora = rm.attach(mlp(), METHOD)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(remora.parameter_groups(lr=0.1)), 10)
    with pytest.raises(ValueError, match=r"needs a LambdaLR, got CosineAnnealingLR; use schedule\(\)"):
        remora.rewarm(scheduler, total_steps=10, restart_warmup_steps=1)


@each(
    ("method", "seed", "words"),
    [
        (rm.ReLoRA(2, merge_every=3), 0, "method is 'remora', expected 'relora'"),
        (METHOD, 1, "seed is 0, expected 1"),
        (rm.ReMoRA(2, merge_every=2), 0, "merge_every is 3, expected 2"),
        (rm.ReMoRA(2, operators=(1, 3), merge_every=3), 0, r"operators is \[1, 2\], expected \[1, 3\]"),
        (rm.ReMoRA(3, merge_every=3), 0, "rank is 2, expected 3"),
        (rm.ReMoRA(square_size=4, merge_every=3), 0, "square_size is None, expected 4"),
        (rm.ReMoRA(2, merge_every=3, merge_until_step=2), 0, "merges_done is 1, expected 0"),
    ],
)
def test_the_state_of_another_course(method: Any, seed: int, words: str, tmp_path: Path) -> None:
    model = mlp()
    remora = rm.attach(model, METHOD)
    optimizer = torch.optim.AdamW(remora.parameter_groups(lr=1e-2))
    for _ in range(4):
        step(model, optimizer)
        remora.after_step(optimizer)
    remora.save(tmp_path)
    other = rm.attach(mlp(), method, seed=seed)
    for load in (lambda: other.load_state_dict(remora.state_dict()), lambda: other.load(tmp_path)):
        with pytest.raises(ValueError, match=f"{words}.*call attach"):
            load()
    assert other.step == 0


def test_a_state_of_other_targets_or_another_scale() -> None:
    for ours, theirs, words in (
        ({"targets": ["0"]}, {"targets": ["2"]}, "targets is ['0'], expected ['2']"),
        ({"method": rm.LoRA(4, alpha=4)}, {"method": rm.LoRA(4, alpha=64)}, "alpha is 4.0, expected 64.0"),
    ):
        state = rm.attach(mlp(), **{"method": METHOD, **ours}).state_dict()
        other = rm.attach(mlp(), **{"method": METHOD, **theirs})
        with pytest.raises(ValueError, match=re.escape(words)):
            other.load_state_dict(state)


def test_a_folder_without_a_state(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"remora.safetensors: there is no state of the adapters"):
        rm.attach(mlp(), METHOD).load(tmp_path)
