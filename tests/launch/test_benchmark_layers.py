"""launch/benchmark layers: its output, its layers, and what it and steps refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from relora_mora.config.schema import MethodConfig
from relora_mora.operators import GroupingOperator
from tests.tools.commands import call, module_of, refused

pytestmark = pytest.mark.more

LAYERS = "launch/benchmark/layers.py"
MODEL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    return str(tmp_path / "model.json")


def test_every_round_is_a_line_and_the_table_ends_with_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    module_of(LAYERS).main(model, tokens=8, rank=4, repetitions=2)
    shown = capsys.readouterr()
    assert [line.partition(":")[0] for line in shown.err.splitlines()] == [f"round {n} of 3" for n in (1, 2, 3)]
    *table, last = shown.out.splitlines()
    assert json.loads(last)["device"] in table[0]
    assert len(json.loads(last)["milliseconds"]) == len(table) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json"], "none.json"),
        (["MODEL", "--dtype=fp16"], "--dtype: got fp16"),
        (["MODEL", "--repetitions=0"], "--repetitions: got 0"),
        (["MODEL", "--operator=5"], "--operator: got 5"),
        (["MODEL", "--device=tpu"], "--device: got tpu, expected cpu or cuda"),
    ],
)
def test_wrong_arguments(model: str, arguments: list[str], message: str) -> None:
    refused(call(LAYERS, *(model if argument == "MODEL" else argument for argument in arguments)), message)


@pytest.mark.parametrize("kind", ["layers", "steps"])
def test_a_missing_gpu_gives_one_message(model: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the option wins
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = call(f"launch/benchmark/{kind}.py", model, "--device=cuda")
    refused(answer, "--device: got cuda, but torch", "sees no GPU here")


@pytest.mark.parametrize(("kind", "notes"), [("layers", 0), ("steps", 1)])  # full rank is ready before
def test_adapters_larger_than_the_weights_are_not_measured(model: str, kind: str, notes: int) -> None:
    answer = call(f"launch/benchmark/{kind}.py", model, "--rank=64")
    refused(answer, "rank: the adapters of a layer have", "lower it", notes=notes)


def test_the_linears_of_a_layer_share_inputs_as_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = module_of(LAYERS)
    made: list[int] = []
    compress = GroupingOperator.compress_for_gradient
    monkeypatch.setattr(
        GroupingOperator, "compress_for_gradient", lambda op, x: made.append(op.square_size) or compress(op, x)
    )
    variant = layers.Variant(
        "mora merged",
        layers.linears(LlamaConfig(**MODEL)),
        MethodConfig(name="mora", rank=4),
        operator=1,
        tokens=6,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    variant.milliseconds()
    assert len(made) == 4
