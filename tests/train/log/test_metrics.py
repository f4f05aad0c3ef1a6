"""metrics.jsonl and TensorBoard say the same, and a resume leaves no step twice."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from relora_mora.config.load import dump, validate
from relora_mora.system.logs import log, setup_logging, shared_log
from relora_mora.train.log.loggers import TensorBoard
from tests.tools.config_tools import tree
from tests.tools.runs import metrics as metrics_of
from tests.tools.runs import opened


def _write_config(folder, **sections):
    (folder / "config.yaml").write_text(dump(validate(tree(**sections), "the test")))


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _events(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def _board(folder, tag):
    events = _events(folder)
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def test_a_resume_drops_what_was_logged_beyond_it(tmp_path):
    _write_config(tmp_path)
    first = opened(tmp_path, 0, loggers=[TensorBoard(tmp_path)])
    for step in range(1, 7):
        first.write(step, {"train/loss": float(step), "merge/layers": 3})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "tra')  # a line that a kill cut off
    second = opened(tmp_path, 4, loggers=[TensorBoard(tmp_path)])
    for step in (5, 6):
        second.write(step, {"train/loss": 10.0 * step})
    second.close()
    assert [(line["step"], line["train/loss"]) for line in _lines(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 50),
        (6, 60),
    ]
    assert all("time" in line for line in _lines(tmp_path))
    assert _board(tmp_path, "train/loss") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60)]


def test_a_folder_that_is_unwritable_for_a_while_loses_lines_without_a_traceback(tmp_path, capfd):
    _write_config(tmp_path)
    metrics = opened(tmp_path, 0, loggers=[TensorBoard(tmp_path)])
    metrics.write(1, {"train/loss": 1.0})
    board = tmp_path / "tensorboard"
    board.rename(tmp_path / "away")
    board.write_text("")  # in its place
    setup_logging(0)
    output, step, deadline = "", 2, time.monotonic() + 30
    while "metrics cannot be written" not in output:  # a thread finds that out
        output += capfd.readouterr().err
        assert time.monotonic() < deadline
        metrics.write(step, {"train/loss": 1.0})
        step += 1
        time.sleep(0.01)
    board.unlink()
    (tmp_path / "away").rename(board)
    metrics.write(step, {"train/loss": 2.0})
    metrics.write(step + 1, {"train/loss": 3.0})
    metrics.close()
    assert _board(tmp_path, "train/loss")[-2:] == [(step, 2.0), (step + 1, 3.0)]
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, step + 2))
    assert "Traceback" not in output + capfd.readouterr().err


def test_a_full_disk_at_a_rollback_loses_lines_and_duplicates_no_step(tmp_path, monkeypatch):
    metrics = opened(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write(step, {"train/loss": 1.0})

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as disk:
        disk.setattr("relora_mora.train.log.report.write_synced", full)
        metrics.open(1)
        metrics.write(2, {"train/loss": 2.0})
    metrics.write(3, {"train/loss": 3.0})
    metrics.close()
    assert [(line["step"], line["train/loss"]) for line in _lines(tmp_path)] == [(1, 1.0), (3, 3.0)]


def after_a_power_cut(config: Any) -> dict[str, str]:
    """Trains; what of ``metrics.jsonl`` would have survived a power cut as each checkpoint got its name, and as the end
    was recorded."""
    from relora_mora.supervise import guard
    from relora_mora.train.pretrain import pretrain

    path = Path(config.train.run_dir) / "metrics.jsonl"
    found: dict[str, str] = {}
    survives = ""
    fsync, rename, record_end = os.fsync, Path.rename, guard.exits.record_end

    def sync(handle: int) -> None:
        nonlocal survives
        fsync(handle)
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            survives = path.read_text()

    def name(path: Path, target: Path) -> Path:
        found[target.name] = survives
        return rename(path, target)

    def end(*args: Any, **how: Any) -> None:
        found["end"] = survives
        record_end(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        patch.setattr(Path, "rename", name)
        patch.setattr(guard.exits, "record_end", end)
        pretrain(config)
    return found


@pytest.mark.distributed
def test_a_power_cut_loses_no_line_before_a_checkpoint_or_the_end(runs, pools, tmp_path):
    """Else the same command would not evaluate again, and the evaluation would be lost for good."""
    config = runs.config(tmp_path / "run", checkpoint={"every_steps": 5})
    [found] = pools(1)(after_a_power_cut, config)
    assert {"step-00000005", "step-00000010", "end"} <= found.keys()
    for step in (5, 10):
        lines = [json.loads(line) for line in found[f"step-{step:08d}"].splitlines()]
        assert [line["step"] for line in lines if "eval/loss" in line][-1] == step
    assert [json.loads(line) for line in found["end"].splitlines()] == metrics_of(tmp_path / "run")


def test_a_start_repeats_what_came_after_a_checkpoint_and_a_rollback_does_not(tmp_path):
    """The evaluation was stopped, so the first resume from the checkpoint made it."""
    saved = [{"train/loss"}, {"perf/checkpoint_stall_seconds"}]
    metrics = opened(tmp_path, 0)
    for values in ({"train/loss": 1.0}, {"perf/checkpoint_stall_seconds": 0.5}, {"eval/loss": 2.0}):
        metrics.write(3, values)
    metrics.open(3, rollback=True)
    assert [line.keys() - {"step", "time"} for line in _lines(tmp_path)] == [*saved, {"eval/loss"}]
    metrics.open(3)
    metrics.close()
    assert [line.keys() - {"step", "time"} for line in _lines(tmp_path)] == saved


def test_the_first_rank_logs_what_concerns_all_ranks(capsys):
    for rank, shown in ((0, True), (1, False)):
        setup_logging(rank)
        shared_log.warning("skipped")
        log.warning("a bad line in my shard")
        errors = capsys.readouterr().err
        assert ("skipped" in errors) is shown
        assert "a bad line in my shard" in errors
    setup_logging(0)


def test_every_number_is_a_curve_of_its_own_name_and_the_settings_are_text(tmp_path):
    _write_config(tmp_path, optim={"lr": 0.25})
    metrics = opened(tmp_path, 0, loggers=[TensorBoard(tmp_path)])
    metrics.write(3, {"eval/c4/loss": 2.0, "perf/mfu": 0.5, "merge/layers": 3, "train/skipped_data": ["a text"]})
    metrics.close()
    tags = _events(tmp_path).Tags()
    assert sorted(tags["scalars"]) == ["eval/c4/loss", "merge/layers", "perf/mfu"]
    assert _board(tmp_path, "eval/c4/loss") == [(3, 2.0)]
    [settings] = _events(tmp_path).Tensors("run/config/text_summary")
    assert b"lr: 0.25" in settings.tensor_proto.string_val[0]
