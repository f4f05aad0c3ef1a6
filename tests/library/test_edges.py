"""Uses of the library that its examples do not show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import relora_mora as rm
from tests.tools.each import each


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))


def steps(remora: rm.AttachedAdapters, optimizer: torch.optim.Optimizer, count: int, schedule: Any = None) -> None:
    dtype = next(remora.model.parameters()).dtype
    for _ in range(count):
        remora.model(torch.ones(3, 16, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        remora.after_step(optimizer)


@each("method", [rm.MoRA(2, form="merged"), rm.LoRA(2, form="merged")])
def test_second_derivatives_are_refused_in_the_merged_form(method):
    model = mlp()
    rm.attach(model, method)
    x = torch.randn(3, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivatives; use the form decoupled"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@each("reset", ["magnitude", "random"])
def test_an_optimizer_without_moments_has_nothing_to_reset(reset):
    remora = rm.attach(mlp(), rm.ReMoRA(2, merge_every=2, reset=reset))
    steps(remora, torch.optim.SGD(remora.parameter_groups(lr=0.1)), 5)
    assert remora.merges_done == 2


def test_a_tied_head_stays_tied_in_the_merged_model():
    from transformers import LlamaForCausalLM

    from tests.tools.tiny import tiny_llama

    remora = rm.attach(LlamaForCausalLM(tiny_llama(tie_word_embeddings=True)), rm.ReMoRA(2))
    plain: Any = remora.merged()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.lm_head.weight is not remora.model.lm_head.weight


def test_frozen_parameters_stay_frozen_in_the_merged_model():
    model = mlp()
    model[2].bias.requires_grad_(False)
    plain = rm.attach(model, rm.LoRA(2)).merged()
    assert [name for name, parameter in plain.named_parameters() if not parameter.requires_grad] == ["2.bias"]


def test_a_compiled_model_merges_into_one_that_runs():
    model = torch.compile(mlp(), backend="eager")
    remora = rm.attach(model, rm.ReMoRA(2, merge_every=2))
    steps(remora, torch.optim.AdamW(remora.parameter_groups(lr=0.01)), 3)
    x = torch.randn(3, 16)
    torch.testing.assert_close(remora.merged()(x), model(x))


def test_a_failed_attach_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(4, 4))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="square_multiple: 8 is more than R of a 4 -> 4 layer"):
        rm.attach(model, rm.ReMoRA(2, square_multiple=8))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    rm.attach(model, rm.ReMoRA(2))


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
def test_schedules_that_are_refused(changes, message):
    remora = rm.attach(mlp(), rm.ReMoRA(2, merge_every=10))
    optimizer = torch.optim.AdamW(remora.parameter_groups(lr=0.01))
    with pytest.raises(ValueError, match=message):
        remora.schedule(optimizer, **{**SCHEDULE, **changes})
    remora.schedule(optimizer, **SCHEDULE)


def test_a_run_that_is_too_short_for_a_merge_is_allowed(caplog):
    remora = rm.attach(mlp(), rm.ReMoRA(2))
    optimizer = torch.optim.AdamW(remora.parameter_groups(lr=0.01))
    schedule = remora.schedule(optimizer, **{**SCHEDULE, "total_steps": 6})
    assert "2000 means no merge in 6 steps" in caplog.text
    steps(remora, optimizer, 6, schedule)
    assert (remora.step, remora.operator) == (6, 1)


def test_base_weights_that_train_are_refused():
    remora = rm.attach(mlp(), rm.ReMoRA(2))
    remora.model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"2 weights of adapter layers \(0.weight, ...\) require gradients"):
        remora.parameter_groups(lr=0.01)


def test_a_step_without_an_optimizer_is_refused():
    with pytest.raises(ValueError, match="needs the optimizer that trains the model, got None"):
        rm.attach(mlp(), rm.ReMoRA(2)).after_step(None)


def test_a_state_of_another_dtype_is_refused():
    remora = rm.attach(mlp(), rm.ReMoRA(2, merge_every=2))
    steps(remora, torch.optim.AdamW(remora.parameter_groups(lr=0.01)), 3)
    other = rm.attach(mlp().bfloat16(), rm.ReMoRA(2, merge_every=2))
    with pytest.raises(ValueError, match=r"dtypes is \['torch.float32'\], expected \['torch.bfloat16'\]"):
        other.load_state_dict(remora.state_dict())
    steps(other, torch.optim.AdamW(other.parameter_groups(lr=0.01)), 3)
    with pytest.raises(ValueError, match="float32 values of 0 frozen weights, and the model needs them of 2"):
        other.load_state_dict({**other.state_dict(), "base": {}})
    with pytest.raises(ValueError, match=r"not a state of adapters of this release: it has no .*base, .*merges_done"):
        other.load_state_dict({"step": 1, "seed": 0, "method": "remora", "operator": 1})


def test_accelerate_saves_and_loads_the_adapters(tmp_path):
    from accelerate import Accelerator

    from tests.tools.fsdp_on_cpus import fsdp_on_cpus

    def parts(accelerator: Accelerator) -> tuple[rm.AttachedAdapters, Any]:
        remora = rm.attach(mlp().bfloat16(), rm.ReMoRA(2, merge_every=2))
        accelerator.register_for_checkpointing(remora)
        _, optimizer = accelerator.prepare(remora.model, torch.optim.AdamW(remora.parameter_groups(lr=0.01)))
        return remora, optimizer

    def train(remora: rm.AttachedAdapters, optimizer: Any, until: int) -> None:
        while remora.step < until:
            inputs = torch.randn(3, 16, generator=torch.Generator().manual_seed(remora.step), dtype=torch.float32)
            remora.model(inputs.bfloat16()).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            remora.after_step(optimizer)

    with fsdp_on_cpus():
        accelerator = Accelerator(cpu=True)
        whole, optimizer = parts(accelerator)
        train(whole, optimizer, 3)
        accelerator.save_state(str(tmp_path))
        train(whole, optimizer, 7)
        accelerator = Accelerator(cpu=True)
        resumed, optimizer = parts(accelerator)
        accelerator.load_state(str(tmp_path))
        assert (resumed.step, resumed.operator) == (3, 2)
        train(resumed, optimizer, 7)
    expected = whole.merged_state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.merged_state_dict().items())


def test_a_longer_run_continues_a_finished_one_exactly():
    """The last step of a run does not merge, so the run that continues it does."""

    def parts(total_steps):
        remora = rm.attach(mlp(), rm.ReMoRA(2, merge_every=5))
        optimizer = torch.optim.AdamW(remora.parameter_groups(lr=0.02))
        schedule = remora.schedule(
            optimizer, total_steps=total_steps, warmup_steps=0, restart_warmup_steps=2, kind="constant"
        )
        return remora, optimizer, schedule

    whole, optimizer, schedule = parts(20)
    steps(whole, optimizer, 20, schedule)
    first, optimizer, schedule = parts(10)
    steps(first, optimizer, 10, schedule)
    assert (first.merges_done, first.operator) == (1, 2)
    second, later, longer = parts(20)
    second.model.load_state_dict(first.model.state_dict())
    later.load_state_dict(optimizer.state_dict())
    longer.load_state_dict(schedule.state_dict())
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"left out the merge after its last step; call catch_up\(\) first"):
        second.after_step(later)
    assert second.catch_up(later, longer).operator_after == 1
    assert second.catch_up(later, longer) is None
    steps(second, later, 10, longer)
    merged = second.merged_state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in whole.merged_state_dict().items())


@each("method", [rm.ReMoRA(2), rm.ReLoRA(2)])
def test_adapters_are_float32_whatever_the_defaults_of_torch_are(method):
    model = mlp()
    torch.set_default_dtype(torch.bfloat16)
    try:
        remora = rm.attach(model, method)
    finally:
        torch.set_default_dtype(torch.float32)
    values = [model.get_parameter(name) for name in remora.names]
    assert {value.dtype for value in values} == {torch.float32}
    again = rm.attach(mlp(), method)
    assert all(map(torch.equal, values, (again.model.get_parameter(name) for name in again.names)))


def test_layers_in_a_wrapper_are_merged():
    """Wrappers such as torch's for activation checkpointing change the names of modules, but not those of the state."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(mlp(), nn.Linear(16, 4))
    remora = rm.attach(model, rm.ReMoRA(2, merge_every=2))
    model[0] = checkpoint_wrapper(model[0])
    steps(remora, torch.optim.AdamW(remora.parameter_groups(lr=0.02)), 3)
    plain = nn.Sequential(mlp(), nn.Linear(16, 4))
    plain.load_state_dict(remora.merged_state_dict())
    x = torch.randn(5, 16)
    torch.testing.assert_close(plain(x), model(x))
    torch.testing.assert_close(remora.merged()(x), model(x))


class CountsPerGroup(torch.optim.SGD):
    """Like apex's FusedAdam, it keeps the number of steps in the group."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        return super().step(closure)


def test_a_merge_resets_the_step_count_of_a_group():
    remora = rm.attach(mlp(), rm.ReMoRA(2, merge_every=2))
    optimizer = CountsPerGroup(remora.parameter_groups(lr=0.02), momentum=0.9)
    steps(remora, optimizer, 3)
    assert {group["name"]: group["step"] for group in optimizer.param_groups} == {"adapters": 1, "vectors": 3}


def test_a_step_count_that_adapters_share_with_other_parameters() -> None:
    model = mlp()
    remora = rm.attach(model, rm.ReMoRA(2, merge_every=3))
    optimizer = CountsPerGroup([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    optimizer.step()
    with pytest.raises(ValueError, match=r"CountsPerGroup keeps one step count per group.*parameter_groups\(\)"):
        remora.after_step(optimizer)


def test_weights_without_their_state_bring_the_operator():
    remora = rm.attach(mlp(), rm.ReMoRA(2, merge_every=2))
    steps(remora, torch.optim.SGD(remora.parameter_groups(lr=0.1)), 3)
    other = rm.attach(mlp(), rm.ReMoRA(2, merge_every=2))
    other.model.load_state_dict(remora.model.state_dict(), strict=True)
    x = torch.randn(3, 16)
    assert (remora.operator, other.operator) == (2, 2)
    assert torch.equal(other.model(x), remora.model(x))


def test_save_makes_its_folder(tmp_path):
    remora = rm.attach(mlp(), rm.ReMoRA(2))
    remora.save(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "remora.safetensors").is_file()
    remora.load(tmp_path / "a" / "b")


def test_catch_up_leaves_the_rates_of_other_schedules():
    remora = rm.attach(mlp(), rm.ReMoRA(2, merge_every=2))
    optimizer = torch.optim.AdamW(remora.parameter_groups(lr=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    steps(remora, optimizer, 3, schedule)
    rate = schedule.get_last_lr()
    assert remora.catch_up(optimizer, schedule) is None
    assert schedule.get_last_lr() == rate


def test_adapters_that_have_no_gradient_in_the_first_step():
    """Two towers, one of which is not used."""
    model = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in "ab"})
    remora = rm.attach(model, rm.ReMoRA(2, merge_every=2))
    optimizer = torch.optim.AdamW(remora.parameter_groups(lr=0.02))
    for tower in "aabb":
        model[tower](torch.ones(3, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        remora.after_step(optimizer)
    assert remora.merges_done == 2


class Packed(torch.Tensor):
    """As torchao's moments in 8 bits: it can do little of what a tensor can do."""

    def zero_(self):
        raise NotImplementedError


class Packs(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    moments = torch.ones_like(parameter).detach().as_subclass(Packed)
                    self.state[parameter] = {"step": torch.ones(()), "exp_avg": moments}
        return super().step(closure)


def test_state_that_packs_its_values_starts_again():
    remora = rm.attach(mlp(), rm.ReMoRA(2, merge_every=2))
    optimizer = Packs(remora.parameter_groups(lr=0.02))
    steps(remora, optimizer, 2)
    assert not any(optimizer.state.get(remora.model.get_parameter(name)) for name in remora.names)
    steps(remora, optimizer, 3)
    other = rm.attach(mlp(), rm.ReMoRA(2, merge_every=2, reset="magnitude"))
    with pytest.raises(ValueError, match=r"Packs keeps 'exp_avg' of 0.mora_M, which has no value per element"):
        steps(other, Packs(other.parameter_groups(lr=0.02)), 1)


def test_a_seed_of_numpy_can_be_saved(tmp_path):
    rm.attach(mlp(), rm.ReMoRA(2), seed=np.int64(3)).save(tmp_path)
    other = rm.attach(mlp(), rm.ReMoRA(2), seed=3)
    other.load(tmp_path)
    assert other.seed == 3


def test_a_merge_that_stops_halfway_says_that_the_model_is_unusable(monkeypatch):
    remora = rm.attach(mlp(), rm.ReMoRA(2, merge_every=2))
    monkeypatch.setattr("relora_mora.engine.torch_state.restart_state", lambda *given: 1 / 0)
    with pytest.raises(rm.MergeError, match=r"stopped halfway.*unusable; go back .*ZeroDivisionError"):
        steps(remora, torch.optim.AdamW(remora.parameter_groups(lr=0.02)), 2)


class Gpt(nn.Module):
    """A GPT of one's own; its head comes first."""

    def __init__(self, width: int = 8, outputs: int = 8) -> None:
        super().__init__()
        self.lm = nn.Linear(width, outputs, bias=False)
        self.tokens, self.places = nn.Embedding(8, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width) for name in ("q", "k")}) for _ in range(2)
        )


def test_the_output_head_of_any_language_model_is_left_out_and_the_log_says_so(caplog):
    from transformers import LlamaConfig, LlamaForCausalLM

    caplog.set_level("INFO", "relora_mora")
    tied = Gpt()
    tied.lm.weight = tied.tokens.weight
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    llama = LlamaForCausalLM(LlamaConfig(**sizes))
    sequence = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8), nn.Linear(8, 8))
    heads = {Gpt(): "lm", tied: "lm", llama: "lm_head", sequence: "2"}
    for model, head in heads.items():
        remora = rm.attach(model, rm.LoRA(2))
        assert caplog.messages[-1].endswith(f"not adapted: {head} (output head)")
        assert caplog.messages[-1] in repr(remora)
    assert "4 linear layers adapted: blocks.*.q, blocks.*.k; not" in caplog.messages[0]
    assert isinstance(sequence[-1], nn.Linear)
    remora = rm.attach(Gpt(), rm.LoRA(2), targets=["q"])
    assert "2 linear layers adapted: blocks.*.q; not adapted: lm (output head), blocks.*.k" in repr(remora)
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_an_output_head_that_cannot_be_recognized_is_a_warning(caplog):
    caplog.set_level("INFO", "relora_mora")
    rm.attach(mlp(), rm.LoRA(2))
    remora = rm.attach(Gpt(outputs=10), rm.LoRA(2))
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert all("no output head was recognized" in message and "targets=" in message for message in caplog.messages)
    assert "lm" in remora.layers


def test_a_record_of_a_merge_is_shown_with_four_digits():
    remora = rm.attach(mlp(), rm.ReLoRA(2, merge_every=1))
    optimizer = torch.optim.SGD(remora.parameter_groups(lr=0.1))
    remora.model(torch.ones(3, 16)).square().mean().backward()
    optimizer.step()
    record = remora.after_step(optimizer)
    assert f"delta_norm={{0: {record.delta_norm['0']:.4g}, " in repr(record)
