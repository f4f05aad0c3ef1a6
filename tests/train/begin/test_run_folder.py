"""A run folder that cannot be written: at the start it is the user's mistake, later it ends no run before its last
checkpoint."""

import math
import subprocess
from pathlib import Path

import pytest

from relora_mora.config.load import ConfigError
from relora_mora.supervise.lock import RunLock
from relora_mora.system.run_folder import RunFolder, read_json_lines
from relora_mora.train.begin.settings import check_run_folder
from tests.tools.commands import PRETRAIN, call, disk
from tests.tools.jobs import Job, ends, write_config
from tests.tools.runs import logged_steps, metrics, run_config

pytestmark = pytest.mark.distributed


def _config(inputs: Path, tokenizer: str, run_dir: Path, config: Path, **train: object) -> Path:
    settings = run_config(
        inputs,
        tokenizer,
        run_dir,
        2,
        train=train,
        checkpoint={"every_steps": 10, "keep_last": 2},
        log={"tensorboard": True},
    )
    return write_config(settings, config)


def test_a_read_only_run_folder_is_refused_before_the_model_is_built(pools, inputs, tokenizer_path, tmp_path):
    with disk(tmp_path / "disk", "ro") as folder:
        config = _config(inputs, tokenizer_path, folder / "run", tmp_path / "run.yaml")
        answers = pools(2)(call, PRETRAIN, config)
    assert [answer.code for answer in answers] == [2, 2]
    output = "".join(answer.out + answer.err for answer in answers)
    assert output.count("Read-only file system") == 1
    assert "Traceback" not in output
    assert "adapters on" not in output


def test_a_folder_that_is_not_a_run_is_refused_and_not_changed(pools, inputs, tokenizer_path, tmp_path):
    """The settings file is already in the folder that the run trains in."""
    folder = tmp_path / "mine"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "notes.txt").write_text("my own")
    config = _config(inputs, tokenizer_path, folder, folder / "config.yaml")
    before = {path: path.read_bytes() for path in (config, folder / "tokenizer" / "notes.txt")}
    answers = pools(2)(call, PRETRAIN, config)
    assert [answer.code for answer in answers] == [2, 2]
    output = "".join(answer.out + answer.err for answer in answers)
    assert output.count(f"{folder} is not the folder of a run") == 1, output
    assert "config.yaml, tokenizer there; give a new or empty folder" in output
    assert "Traceback" not in output
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in folder.iterdir()} - {"ends.jsonl"} == {"config.yaml", "tokenizer"}


def test_foreign_files_are_not_overwritten(tmp_path):
    (tmp_path / "wandb-id.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch=1.ckpt").touch()
    with pytest.raises(ConfigError, match=r"a run would overwrite wandb-id\.txt there"):
        check_run_folder(RunFolder(tmp_path))
    (tmp_path / "lock").touch()
    check_run_folder(RunFolder(tmp_path))


@pytest.mark.stops
def test_a_disk_that_is_full_for_a_while_loses_only_lines_and_checkpoints(inputs, tokenizer_path, tmp_path):
    with disk(tmp_path / "disk", "size=32m") as folder:
        run_dir, ballast = folder / "run", folder / "ballast"
        job = Job(_config(inputs, tokenizer_path, run_dir, tmp_path / "run.yaml", steps=250))
        job.wait_for_step(run_dir, 15)
        subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=4k"], capture_output=True, check=False)
        # three checkpoints, so thirty steps: the room in the last block of the metrics is used up
        job.wait_until(
            lambda: "metrics cannot be written" in job.output and job.output.count("the checkpoint of step") >= 3
        )
        ballast.unlink()
        assert job.wait() == 0, job.output
        steps = logged_steps(run_dir)
        assert steps[-1] == 250
        assert len(steps) < 250
        assert ends(run_dir)[-1]["code"] == 0
        assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000250\n"


@pytest.mark.more
def test_a_run_is_documented_in_its_folder(runs, tmp_path):
    folder = tmp_path / "run"
    runs.train(folder, 2, log={"tensorboard": True}, checkpoint={"every_steps": 0})
    last = next(line for line in reversed(metrics(folder)) if "train/loss" in line)
    assert last["train/tokens"] == 10 * 8 * 32
    assert 0 < last["perf/mfu"] < 1
    assert last["train/perplexity"] == pytest.approx(math.exp(last["train/loss"]))
    for name in ("config.yaml", "model.json", "tokenizer/tokenizer.model", "checkpoints/latest", "tensorboard"):
        assert (folder / name).exists(), name
    [start] = read_json_lines(folder / "starts.jsonl")
    assert (start["world_size"], start["step"]) == (2, 0)
    assert "torch" in start["versions"]


@pytest.mark.more
def test_changes_at_a_resume_are_noted_and_a_finished_run_keeps_its_settings(runs, tmp_path):
    def start(stop_after=None, **sections):
        runs.train(tmp_path / "run", stop_after=stop_after, **sections)
        return read_json_lines(RunFolder(tmp_path / "run").starts)[-1]

    changed = {"optim": {"lr": 0.25}, "train": {"allow_changes": ["optim.lr"]}}
    assert "changed" not in start(stop_after=5)
    [change] = start(**changed)["changed"]
    assert change.startswith("optim.lr: ")
    assert change.endswith(" in the checkpoint, 0.25 now")
    config = RunFolder(tmp_path / "run").config
    trained_with = config.read_text()
    other = {"optim": {"lr": 0.5}, "train": {"allow_changes": ["optim.lr"]}}
    assert start(**other, eval={"max_tokens": 7})["changed"] == [change], "no start is noted"
    assert config.read_text() == trained_with


@pytest.mark.stops
def test_a_run_whose_folder_is_taken_ends_without_touching_it(inputs, tokenizer_path, tmp_path):
    """A run folder is deleted, and maybe started again, while its old processes still run."""
    run_dir = tmp_path / "run"
    job = Job(_config(inputs, tokenizer_path, run_dir, tmp_path / "run.yaml", steps=100_000))
    job.wait_for_step(run_dir, 15)
    other = RunLock(tmp_path / "elsewhere")
    other.acquire()
    other.path.replace(run_dir / "lock")
    assert job.wait() == 2, job.output
    assert "the run folder was removed or moved, or another trainer works in it" in job.output
    assert "Traceback" not in job.output
    other.release()
