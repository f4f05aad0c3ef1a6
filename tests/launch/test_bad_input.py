"""Bad input to a command: one clear message and exit code 2. Checkpoints: tests/train/begin/test_bad_input.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from relora_mora.config.load import load_config
from tests.tools.commands import PLAN, TRAIN, call, left_in, refused, run_main
from tests.tools.each import each
from tests.tools.helpers import ROOT, RUBBISH
from tests.tools.runs import write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> Path:
    """Text, a model's config, settings that name them, and all kinds of files with other content."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    settings = {
        "model": {"config": str(folder / "model.json")},
        "tokenizer": {"path": tokenizer_path},
        "data": {name: f"{folder}/{name}/*.json.gz" for name in ("train", "validation")} | {"sequence_length": 32},
        "method": {"rank": 3},
        "train": {"run_dir": str(folder / "run")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    for name in ("rubbish", "rubbish.json"):
        (folder / name).write_bytes(RUBBISH)
    (folder / "folder").mkdir()
    (folder / "folder" / "something").write_text("else")
    return folder


def test_in_another_folder_the_message_names_the_base_of_relative_paths(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = f"(relative paths start from the current folder, {tmp_path})"
    refused(call(PLAN, "configs/run/mine.yaml"), "cannot read it", started)
    refused(call(PLAN, inputs / "run.yaml", "--model.config=no/mine.json"), "cannot read no/mine.json (No", started)
    absolute = call(PLAN, tmp_path / "none.yaml")
    refused(absolute, "cannot read it")
    assert "relative" not in absolute.err


@each("script", ["launch/pretrain.py", "tokenizer/train.py"])
def test_outside_the_environment_a_script_reports_it(script: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", ROOT / script]  # -S: without site-packages
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    message = "activate the environment (source .venv/bin/activate), or make one (make env)"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"No module named 'relora_mora': {message}\n"


def test_a_missing_package_is_not_a_traceback() -> None:
    def main() -> None:
        import a_package_that_nobody_has  # noqa: F401

    refused(run_main(main), "No module named 'a_package_that_nobody_has'", sys.executable, "make env")


@each(
    "setting,message",
    [
        ("model.config={}/nowhere", "model.config: cannot read {}/nowhere (No such file or directory)"),
        ("model.config={}/folder", "model.config: cannot read {}/folder (Is a directory)"),
        ("model.config={}/rubbish", "model.config: not JSON"),
        ("model.overrides.num_attention_heads=7", "number of attention heads (7)"),
        ("data.sequence_length=65", "more than the model's max_position_embeddings (64)"),
        ("method.square_size=41", "method.square_size: R of 41 is larger than both widths of q_proj (24, 24)"),
    ],
)
def test_settings_of_a_plan(inputs: Path, setting: str, message: str) -> None:
    refused(call(PLAN, inputs / "run.yaml", "--" + setting.format(inputs)), message.format(inputs))


def test_a_source_without_text(inputs: Path, tmp_path: Path) -> None:
    answer = call(TRAIN, f"--data={inputs / 'rubbish.json'}", f"--out={tmp_path / 'out'}", "--vocab_size=300")
    notes = answer.err.count("; skipped\n")  # about single lines, before the message
    refused(answer, "lines are bad, more than data.max_bad_fraction", notes=notes)
    assert left_in(tmp_path) == []


@each(
    "setting,message",
    [
        ("data.validation={}/folder", "holds no text files; check its content, or give its files by path"),
        ("model.overrides.vocab_size=299", "only 299 (vocab_size); set --model.overrides.vocab_size=300, or use a"),
        ("method.rank=15", "have 10,808 parameters, more than the 10,368 of their weights; lower it"),
        ("model.overrides={{hidden_size: 65536, num_hidden_layers: 50}}", "weights and optimizer state need"),
    ],
)
def test_faults_that_the_trainer_finds_before_training(inputs: Path, setting: str, message: str) -> None:
    from relora_mora.train.begin.inputs import open_inputs

    def main(config: str, **overrides: str) -> None:
        open_inputs(load_config(config, overrides), world_size=1)

    refused(run_main(main, inputs / "run.yaml", "--" + setting.format(inputs)), message)
