"""Digests of what runs begin with."""

import json
from pathlib import Path

import pytest

from relora_mora.config.schema import ModelConfig
from relora_mora.weights.digests import model_digests, other_weights

HARMS = {"config.json": b"{ }", "model-00002-of-00002.safetensors": b"x" * 200_000}


def _digest(folder: Path) -> str | None:
    return model_digests(ModelConfig(init_from=str(folder))).get("model.init_from")


def _write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = _write(tmp_path / "model", **{"config.json": "{}", "README.md": "a model"})
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes([number]) * 200_000)
    return folder


@pytest.mark.parametrize("name", HARMS)
def test_another_config_or_weights_are_noticed(model: Path, name: str):
    before = _digest(model)
    assert before is not None
    assert len(before) == 32
    (model / "README.md").write_text("other words")
    assert _digest(model) == before
    (model / name).write_bytes(HARMS[name])
    assert _digest(model) != before


def test_a_run_is_represented_by_its_newest_checkpoint(tmp_path: Path):
    run = tmp_path / "run"
    for step in (9, 10):
        _write(run / "checkpoints" / f"step-{step:08d}", **{"manifest.json": f"of step {step}"})
    newest = run / "checkpoints" / "step-00000010"
    assert _digest(run) == _digest(run / "checkpoints") == _digest(newest) is not None
    _write(run / "checkpoints" / "step-00000011.tmp", **{"manifest.json": "being removed"})
    assert _digest(run) == _digest(newest)
    newest.rename(tmp_path / "aside")
    assert _digest(run) == _digest(run / "checkpoints" / "step-00000009") != _digest(tmp_path / "aside")


def test_every_setting_that_exists_has_a_digest(tmp_path: Path, model: Path):
    adapter = _write(tmp_path / "adapter", **{"adapter_config.json": "{}"})
    given = {"config": str(model / "config.json"), "init_from": str(model), "adapter": str(adapter)}
    assert set(model_digests(ModelConfig(**given))) == {f"model.{name}" for name in given}
    assert model_digests(ModelConfig(init_from=str(tmp_path / "none"), config=str(tmp_path / "none.json"))) == {}


def test_a_run_is_compared_with_its_newest_start_that_read_weights(tmp_path: Path, model: Path):
    given = ModelConfig(init_from=str(model))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert other_weights(checkpoint, given) == {}
    noted = {**model_digests(given), "data.train": "0" * 32}
    starts = [{"began_with": {"model.init_from": "0" * 32}}, {"began_with": noted}, {"step": 5}]
    lines = "".join(json.dumps(start) + "\n" for start in starts)
    _write(tmp_path / "run", **{"starts.jsonl": lines})
    assert other_weights(checkpoint, given) == {}
    assert other_weights(checkpoint, given.model_copy(update={"adapter": str(model)})) == {
        "model.adapter": "no model.adapter"
    }
    (model / "config.json").write_text("{ }")
    changed = {"model.init_from": "other weights than model.init_from holds now"}
    assert other_weights(checkpoint, given) == changed
    assert other_weights(checkpoint, ModelConfig(init_from=str(tmp_path / "none"))) == {}, "it is not there any more"
    (tmp_path / "run" / "starts.jsonl").write_text(lines + '{"cut')
    assert other_weights(checkpoint, given) == {}
