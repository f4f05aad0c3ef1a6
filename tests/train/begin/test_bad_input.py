"""Checkpoints and models that evaluate and export cannot use: the message names the file, and nothing half-written
stays."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from relora_mora.weights.export import export
from tests.tools.commands import EVALUATE, EXPORT, call, left_in, refused
from tests.tools.each import each
from tests.tools.helpers import RUBBISH
from tests.tools.runs import checkpoint_at, run_config, train

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run_folder(pools, inputs, tokenizer_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    pools(1)(
        train,
        run_config(
            inputs, tokenizer_path, folder, train={"steps": 5}, checkpoint={"every_steps": 4}, eval={"every_steps": 0}
        ),
    )
    return folder


def test_a_path_that_is_not_a_checkpoint(inputs, tmp_path):
    for folder in ("empty", "outputs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_bytes(RUBBISH)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    checkpoint_at(tmp_path / "run", 5).mkdir(parents=True)
    for name, message in {
        "nowhere": "not found; give a run folder",
        "dangling": "not found",
        "loop": "not found",
        "file": "not a folder",
        "empty": "not a checkpoint (manifest.json: No such file or directory)",
        "run": "all checkpoints in it are damaged: ",
        "x" * 300: "File name too long; give a shorter name",
    }.items():
        path = tmp_path / name
        refused(call(EVALUATE, path, f"--data={inputs}/validation/*.json.gz"), str(path), message)
        refused(call(EXPORT, path, tmp_path / "outputs" / "out"), str(path), message)
        assert left_in(tmp_path / "outputs") == []


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(run_folder, folder)
    return folder


@each("harm", ["missing", "cut"])
def test_a_damaged_model(exported, inputs, tmp_path, harm):
    folder = shutil.copytree(exported, tmp_path / "model")
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    del weights[name]
    if harm == "missing":
        save_file(weights, path, metadata={"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[:-7])
    named = name if harm == "missing" else str(path)
    refused(call(EVALUATE, folder, f"--data={inputs}/validation/*.json.gz"), str(folder), named)


@each(
    ("argv", "message"),
    [
        (["--data={}/nowhere.json"], "no file matches"),
        (
            ["--data={}/model.json"],
            'more than data.max_bad_fraction (0.01); line 1 has no "text", only vocab_size, hidden_size, ',
        ),
        (
            ["--data={}/validation/*.json.gz", "--tokenizer={}/nowhere"],
            "not found; expected a folder with tokenizer.model",
        ),
        (["--data={}/validation/*.json.gz", "--tokenizer={}"], "this folder has no tokenizer"),
        (["--data={}/validation/*.json.gz", "--data.sequence_length=65"], "data.sequence_length: 65 is more than"),
    ],
)
def test_wrong_text_to_score_is_refused(run_folder, inputs, argv, message):
    answer = call(EVALUATE, run_folder, *(argument.format(inputs) for argument in argv))
    refused(answer, message, notes=sum(line.endswith("; skipped") for line in answer.err.splitlines()))


def test_more_sequences_at_once_than_there_are_or_than_fit(run_folder, inputs, monkeypatch):
    argv = (run_folder, f"--data={inputs}/validation/*.json.gz", f"--micro_batch_size={10**15}")
    assert call(EVALUATE, *argv).out == call(EVALUATE, *argv[:2], "--micro_batch_size=1000").out

    def too_much(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("relora_mora.evaluation.score.evaluate", too_much)
    answer = call(EVALUATE, *argv)
    refused(answer, "--micro_batch_size: ", "need more memory than available; lower it", notes=1)


def test_faults_of_this_machine_come_before_any_request(pools, inputs, tokenizer_path, tmp_path):
    """A server that does not answer is asked again for minutes."""
    for tokenizer, model, fault in (
        (str(tmp_path / "none"), {}, "none: not found; expected a folder with tokenizer.model"),
        (tokenizer_path, {"config": "llama_8b"}, "did you mean llama_7b"),
    ):
        config = run_config(inputs, tokenizer, tmp_path / "run", model=model, data={"train": "some/set"})
        with pytest.raises(AssertionError, match=fault):
            pools(1)(_without_requests, config)


def _without_requests(config: Any) -> None:
    from relora_mora.train.begin import inputs

    def asks(*_: Any) -> None:
        raise AssertionError("a server was asked")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "with_commits", asks)
        train(config)
