"""launch/benchmark layers: its output, its layers, and what it and steps refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from relora_mora.config.schema import MethodConfig
from relora_mora.operators import GroupingOperator
from tests.tools.commands import module_of

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
