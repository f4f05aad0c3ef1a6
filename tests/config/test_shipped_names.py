"""Shipped settings by name, from any folder; ``relora-mora configs`` lists and copies them."""

import re
from collections import Counter
from pathlib import Path

import pytest

from relora_mora.config.load import load_config
from relora_mora.config.shipped import FOLDER, MODELS, SETTINGS, find_config, shipped_files
from tests.tools.commands import PLAN, call, refused
from tests.tools.each import each
from tests.tools.helpers import ROOT

NAMES = shipped_files([*SETTINGS, *MODELS])


def test_a_name_means_one_file() -> None:
    files = [path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".json")]
    assert max(Counter(path.stem for path in files).values()) == 1
    assert set(NAMES) == {path.stem for path in files}


def test_a_name_is_read_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("tiny_remora", world_size=1)
    assert config.method.name == "remora"
    assert config.model.config is not None
    assert Path(config.model.config).samefile(FOLDER / "model" / "llama_tiny.json")
    assert load_config("configs/run/tiny_remora.yaml", world_size=1) == config
    assert load_config("tiny_remora", {"model.config": "llama_9m"}).model.config == str(FOLDER / "model/llama_9m.json")


def test_a_file_wins_over_a_name_but_not_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny_remora").write_text("x: 1\n")
    assert find_config("tiny_remora") == Path("tiny_remora")
    Path("configs/run").mkdir(parents=True)
    Path("configs/run/tiny_full.yaml").write_text("x: 1\n")
    assert find_config("configs/run/tiny_full.yaml") == Path("configs/run/tiny_full.yaml")
    Path("tiny_mora").mkdir()
    assert find_config("tiny_mora") == FOLDER / "run/tiny_mora.yaml"


def test_messages_have_the_name_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for flags, title in (
        (["--train.steps=0"], "tiny_remora and the command line:"),
        (["--data.sequence_length=100000"], "llama_tiny:"),
        (["--model.overrides={vocab_size: x}"], "llama_tiny with model.overrides:"),
    ):
        answer = call(PLAN, "tiny_remora", *flags)
        assert answer.code == 2
        assert title in answer.err.splitlines()[0]
        assert str(FOLDER) not in answer.err


@each("given", ["llama_tiny", "chatml", "other/tiny_remora.yaml", "tiny.yaml", "\0", "a" * 300])
def test_other_paths_stay_as_they_are(given: str) -> None:
    assert find_config(given) == Path(given)


def test_the_settings_are_listed_with_what_they_are(tmp_path: Path) -> None:
    answer = call("configs")
    assert max(map(len, answer.out.splitlines())) <= 80
    *_, models = parts = re.split(r"(?m)^(?! ).*:$", answer.out)[1:]
    lines = {line.split()[0]: line for part in parts[:-1] for line in part.splitlines() if line}
    assert {*lines, *models.replace(",", " ").split()} == set(NAMES)
    assert "ReMoRA" in lines["tiny_remora"]


def test_a_copy_is_settings_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("configs", "copy", "tiny_remora", "mine.yaml").code == 0
    assert load_config("mine.yaml") == load_config("tiny_remora")
    assert call(PLAN, "mine.yaml", "--device=h100").code == 0
    refused(call("configs", "copy", "tiny_remora", "mine.yaml"), "mine.yaml: already exists")
    refused(call("configs", "copy", "tiny", "other.yaml"), "tiny: not the name of shipped settings")
    refused(call("configs", "tiny_remora"), "got tiny_remora; give nothing, or: copy NAME PATH")
    refused(call("configs", "copy", "tiny_remora", "missing/mine.yaml"), "missing/mine.yaml")
