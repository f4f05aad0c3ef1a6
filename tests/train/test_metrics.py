"""metrics.jsonl and TensorBoard say the same, and a resume leaves no step twice."""

from __future__ import annotations

import json
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from relora_mora.system.logs import log, setup_logging, shared_log
from relora_mora.train.metrics import Metrics


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _board(folder, tag):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def test_a_resume_drops_what_was_logged_beyond_it(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {}\n")
    first = Metrics(tmp_path, step=0, tensorboard=True)
    for step in range(1, 7):
        first.write(step, {"train/loss": float(step), "merge/layers": 3})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "tra')  # a line that a kill cut off
    second = Metrics(tmp_path, step=4, tensorboard=True)
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


def test_a_new_start_begins_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "train/loss": 1.0}\n')
    metrics = Metrics(tmp_path, step=0, tensorboard=False)
    metrics.write(1, {"train/loss": 2.0})
    metrics.close()
    assert [line["train/loss"] for line in _lines(tmp_path)] == [2.0]
    assert not (tmp_path / "tensorboard").exists()


def test_a_folder_that_cannot_be_written_for_a_while_costs_lines_and_no_traceback(tmp_path, capfd):
    (tmp_path / "config.yaml").write_text("train: {}\n")
    metrics = Metrics(tmp_path, step=0, tensorboard=True)
    metrics.write(1, {"train/loss": 1.0})
    board = tmp_path / "tensorboard"
    board.rename(tmp_path / "away")
    board.write_text("")  # in its place
    setup_logging(0)
    said, step, deadline = "", 2, time.monotonic() + 30
    while "metrics cannot be written" not in said:  # a thread finds that out
        said += capfd.readouterr().err
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
    assert "Traceback" not in said + capfd.readouterr().err


def test_bytes_that_a_disk_has_spoilt_cost_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\xff\x00p": 2}\n{"step": 3}\n')
    Metrics(tmp_path, step=5, tensorboard=False).close()
    assert [line["step"] for line in _lines(tmp_path)] == [1, 3]


def test_what_all_ranks_know_is_said_by_the_first(capsys):
    for rank, shown in ((0, True), (1, False)):
        setup_logging(rank)
        shared_log.warning("skipped")
        log.warning("a bad line in my shard")
        errors = capsys.readouterr().err
        assert ("skipped" in errors) is shown and "a bad line in my shard" in errors
    setup_logging(0)
