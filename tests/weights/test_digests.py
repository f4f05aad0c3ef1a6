"""Digests of what runs begin with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from relora_mora.config.schema import ModelConfig
from relora_mora.system.run_folder import noted_digests
from relora_mora.weights.digests import changed_start, model_digests, start_digests, starts_of
from tests.tools.runs import run_config, write_inputs

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


def test_a_missing_path_has_no_digest(tmp_path: Path, model: Path):
    adapter = _write(tmp_path / "adapter", **{"adapter_config.json": "{}"})
    assert model_digests(ModelConfig(init_from=str(tmp_path / "none"))) == {}
    assert set(model_digests(ModelConfig(init_from=str(model), adapter=str(adapter)))) == {
        "model.init_from",
        "model.adapter",
    }
    assert model_digests(ModelConfig(config=str(tmp_path / "none.json"))) == {}
    (tmp_path / "model.json").write_text("{}")
    assert set(model_digests(ModelConfig(config=str(tmp_path / "model.json")))) == {"model.config"}


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("train/part-00001.json.gz", "other text than data.train holds now"),
        ("validation/part-00000.json.gz", "other text than data.validation holds now"),
        ("tokenizer.model", "another tokenizer than tokenizer.path holds now"),
    ],
)
def test_other_text_and_another_tokenizer_are_noticed(
    tmp_path: Path, tokenizer_path: str, other_tokenizer: str, file: str, said: str
):
    folder = write_inputs(tmp_path)
    tokenizer = Path(shutil.copy(Path(tokenizer_path, "tokenizer.model"), folder))
    config = run_config(folder, str(tokenizer), tmp_path / "run")
    noted = start_digests(config)
    assert noted.keys() == {"model.config", "tokenizer.path", "data.train", "data.validation"}
    assert start_digests(config) == noted
    other = Path(other_tokenizer, file) if file == "tokenizer.model" else folder / "train/part-00002.json.gz"
    shutil.copy(other, folder / file)
    assert changed_start(noted, start_digests(config)) == said
    shutil.rmtree(folder)
    assert start_digests(config) == {}


def test_a_run_is_compared_with_its_newest_start_that_read_weights(tmp_path: Path, model: Path):
    given = ModelConfig(init_from=str(model))
    run = tmp_path / "run"
    assert noted_digests(starts_of(run)) == {}
    noted = model_digests(given)
    starts = [{"began_with": {"model.init_from": "0" * 32}}, {"began_with": noted}, {"step": 5}]
    lines = "".join(json.dumps(start) + "\n" for start in starts)
    _write(run, **{"starts.jsonl": lines})
    assert noted_digests(starts_of(run)) == noted
    assert changed_start(noted, model_digests(given)) is None
    (model / "config.json").write_text("{ }")
    assert changed_start(noted, model_digests(given)) == "other weights than model.init_from holds now"
    assert changed_start(noted, {}) is None, "it is not there any more"
    (run / "starts.jsonl").write_text(lines + '{"cut')
    assert noted_digests(starts_of(run)) == {}
