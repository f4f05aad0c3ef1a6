"""Uses of the library that its examples do not show."""

from typing import Any

import pytest
import torch
from torch import nn

import relora_mora as rm
from tests.tools.each import each
from tests.tools.small import adamw, merging, mlp, steps
from tests.tools.tiny import tiny_llama


@each("method", [rm.MoRA(2, form="merged"), rm.LoRA(2, form="merged")])
def test_second_derivatives_are_refused_in_the_merged_form(method: Any) -> None:
    model = rm.attach(mlp(), method).model
    x = torch.randn(3, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivatives; use the form decoupled"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_frozen_parameters_stay_frozen_in_the_merged_model() -> None:
    model = mlp()
    model[2].bias.requires_grad_(False)
    plain = rm.attach(model, rm.LoRA(2)).merged()
    assert [name for name, parameter in plain.named_parameters() if not parameter.requires_grad] == ["2.bias"]


def _in_wrapper(remora: rm.AttachedAdapters) -> None:
    """As for activation checkpointing: it changes the names of modules, but not those of the state."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    remora.model[0] = checkpoint_wrapper(remora.model[0])


@each("kind", ["compiled", "wrapped"])
def test_a_compiled_or_wrapped_model_merges_into_one_that_runs(kind: str) -> None:
    inner: nn.Module = nn.Sequential(mlp(), nn.Linear(16, 4))
    remora = rm.attach(
        torch.compile(inner, backend="eager") if kind == "compiled" else inner, rm.ReMoRA(2, merge_every=2)
    )
    if kind == "wrapped":
        _in_wrapper(remora)
    steps(remora, adamw(remora), 3)
    x = torch.randn(3, 16)
    torch.testing.assert_close(remora.merged()(x), remora.model(x))
    if kind == "wrapped":
        plain = nn.Sequential(mlp(), nn.Linear(16, 4))
        plain.load_state_dict(remora.merged_state_dict())
        torch.testing.assert_close(plain(x), remora.model(x))


def test_a_failed_attach_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="square_multiple: 8 is more than R of a 4 -> 4 layer"):
        rm.attach(model, rm.ReMoRA(2, square_multiple=8))
    assert all(parameter.requires_grad for parameter in model.parameters())
    rm.attach(model, rm.ReMoRA(2))


def test_a_longer_run_continues_a_finished_one_exactly() -> None:
    """The last step of a run does not merge, so the run that continues it does."""

    def parts(total_steps: int) -> tuple[rm.AttachedAdapters, Any, Any]:
        remora = merging(5)
        optimizer = adamw(remora)
        lengths = {"total_steps": total_steps, "warmup_steps": 0, "restart_warmup_steps": 2}
        return remora, optimizer, remora.schedule(optimizer, **lengths, kind="constant")

    whole, optimizer, schedule = parts(20)
    steps(whole, optimizer, 20, schedule)
    first = parts(10)
    steps(first[0], first[1], 10, first[2])
    assert (first[0].merges_done, first[0].operator) == (1, 2)
    second, later, longer = parts(20)
    second.model.load_state_dict(first[0].model.state_dict())
    for part, state in zip((later, longer, second), (first[1], first[2], first[0]), strict=True):
        part.load_state_dict(state.state_dict())
    with pytest.raises(ValueError, match=r"left out the merge after its last step; call catch_up\(\) first"):
        second.after_step(later)
    record = second.catch_up(later, longer)
    assert record is not None
    assert record.operator_after == 1
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


def test_weights_without_their_state_bring_the_operator() -> None:
    remora, other = merging(), merging()
    steps(remora, adamw(remora), 3)
    other.model.load_state_dict(remora.model.state_dict(), strict=True)
    x = torch.randn(3, 16)
    assert (remora.operator, other.operator) == (2, 2)
    assert torch.equal(other.model(x), remora.model(x))


def test_a_merge_that_stops_halfway_says_that_the_model_is_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    remora = merging()
    monkeypatch.setattr("relora_mora.engine.torch_state.restart_state", lambda *given: 1 / 0)
    with pytest.raises(rm.MergeError, match=r"stopped halfway.*unusable; go back .*ZeroDivisionError"):
        steps(remora, adamw(remora), 2)


class Gpt(nn.Module):
    """A GPT of one's own; its head comes first."""

    def __init__(self, width: int = 8, outputs: int = 8) -> None:
        super().__init__()
        self.lm = nn.Linear(width, outputs, bias=False)
        self.tokens, self.places = nn.Embedding(8, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width) for name in ("q", "k")}) for _ in range(2)
        )


def test_the_output_head_of_any_language_model_is_left_out_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import LlamaForCausalLM

    caplog.set_level("INFO", "relora_mora")
    tied = Gpt()
    tied.lm.weight = tied.tokens.weight
    sequence = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8), nn.Linear(8, 8))
    heads = {Gpt(): "lm", tied: "lm", LlamaForCausalLM(tiny_llama()): "lm_head", sequence: "2"}
    for model, head in heads.items():
        remora = rm.attach(model, rm.LoRA(2))
        assert caplog.messages[-1].endswith(f"not adapted: {head} (output head)")
        assert caplog.messages[-1] in repr(remora)
    assert "4 linear layers adapted: blocks.*.q, blocks.*.k; not" in caplog.messages[0]
    remora = rm.attach(Gpt(), rm.LoRA(2), targets=["q"])
    assert "2 linear layers adapted: blocks.*.q; not adapted: lm (output head), blocks.*.k" in repr(remora)
    rm.attach(mlp(), rm.LoRA(2))
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert "lm" in rm.attach(Gpt(outputs=10), rm.LoRA(2)).layers
    assert caplog.records[-1].levelname == "WARNING"
    assert all("no output head was recognized" in text and "targets=" in text for text in caplog.messages[-2:])
