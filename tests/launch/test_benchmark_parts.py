"""launch/benchmark/parts.py: its implementations compute the same, and its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from relora_mora.config.schema import MethodConfig, ModelConfig
from relora_mora.model.config import read_model_config
from relora_mora.operators import GroupingOperator
from tests.tools.commands import call, module_of, refused

SCRIPT = "launch/benchmark/parts.py"
MODEL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    return str(tmp_path / "model.json")


@pytest.mark.parametrize("part", ["loss", "attention"])
def test_the_implementations_of_a_part_have_the_same_gradients(
    model: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[Any] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: gradients.append(grad(*args, **kwargs)))
    module = module_of(SCRIPT)
    draw = module.draws(torch.float32, torch.device("cpu"))
    ways = module.PARTS[part](read_model_config(ModelConfig(config=model)), 1024, 512, draw)
    for act, _ in ways.values():
        act()
    assert len(gradients) == len(ways) - 1, "only the products have none"
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert a.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_output_ends_with_a_line_of_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for part, ways in (("loss", 4), ("products", 14)):
        module_of(SCRIPT).main(part, model, tokens=64, sequence_length=32, repetitions=1)
        *table, last = capsys.readouterr().out.splitlines()
        found = json.loads(last)
        assert found["part"] == part
        assert found["device"] in table[0]
        assert len(found["milliseconds"]) == len(table) - 1 == ways
        assert all(value > 0 for value in found["milliseconds"].values())
        assert sum("TFLOP/s" in line for line in table) == (1 if part == "loss" else ways)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sum", "MODEL"], "got sum, expected one of loss, attention, products"),
        (["loss", "none.json"], "none.json"),
        (["loss", "MODEL", "--tokens=100"], "--tokens: 100 is not a multiple of --sequence_length 512"),
        (["loss", "MODEL", "--dtype=fp16"], "--dtype: got fp16"),
        (["loss", "MODEL", "--repetitions=0"], "--repetitions: got 0"),
        (["loss", "MODEL", "--device=tpu"], "--device: got tpu, expected cpu or cuda"),
    ],
)
def test_wrong_arguments(model: str, arguments: list[str], message: str) -> None:
    refused(call(SCRIPT, *(model if argument == "MODEL" else argument for argument in arguments)), message)


@pytest.mark.parametrize(
    ("script", "words"),
    [(SCRIPT, ["loss"]), ("launch/benchmark/layers.py", []), ("launch/benchmark/steps.py", [])],
)
def test_a_missing_gpu_gives_one_message(
    model: str, script: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the option wins
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(call(script, *words, model, "--device=cuda"), "--device: got cuda, but torch", "sees no GPU here")


@pytest.mark.parametrize("kind", ["layers", "steps"])
def test_adapters_larger_than_the_weights_are_not_measured(model: str, kind: str) -> None:
    refused(call(f"launch/benchmark/{kind}.py", model, "--rank=64"), "rank: the adapters of a layer have", "lower it")


def test_the_linears_of_a_layer_share_inputs_as_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = module_of("launch/benchmark/layers.py")
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
