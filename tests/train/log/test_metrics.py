"""metrics.jsonl and TensorBoard say the same, and a resume leaves no step twice."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from relora_mora.config.load import dump, validate
from relora_mora.system.logs import log, setup_logging, shared_log
from relora_mora.train.log.loggers import LAYOUT, NO_CURVES, TensorBoard, board_tag
from relora_mora.train.log.report import Metrics
from tests.tools.config_tools import tree
from tests.tools.helpers import ROOT
from tests.tools.runs import metrics as metrics_of
from tests.tools.runs import run_config


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
    first = Metrics(tmp_path, step=0, loggers=[TensorBoard(tmp_path)])
    for step in range(1, 7):
        first.write(step, {"train/loss": float(step), "merge/layers": 3})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "tra')  # a line that a kill cut off
    second = Metrics(tmp_path, step=4, loggers=[TensorBoard(tmp_path)])
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


@pytest.mark.parametrize("ahead_seconds", [(3600,), (7200, 3600), (3600, 7200), 11 * (0,)])
def test_points_of_a_resume_replace_earlier_ones_for_any_clock(tmp_path, monkeypatch, ahead_seconds):
    """TensorBoard orders files by the second in their names, then by a number, 10 before 9; and a file hides steps of
    files that were read before it."""
    _write_config(tmp_path)
    now = time.time()
    for start, ahead in enumerate((*ahead_seconds, 0)):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: now + ahead)
        board = TensorBoard(tmp_path)
        board.open(2 * start)
        for step in range(2 * start + 1, 2 * start + 5):  # two of them will be made again
            board.write(step, {"train/loss": 10.0 * start + step})
        board.close()
    expected = [(step, 10.0 * ((step - 1) // 2) + step) for step in range(1, 2 * start + 1)]
    expected += [(step, 10.0 * start + step) for step in range(2 * start + 1, 2 * start + 5)]
    assert _board(tmp_path, "train/loss") == expected


def test_a_new_start_begins_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "train/loss": 1.0}\n')
    metrics = Metrics(tmp_path, step=0)
    metrics.write(1, {"train/loss": 2.0})
    metrics.close()
    assert [line["train/loss"] for line in _lines(tmp_path)] == [2.0]
    assert not (tmp_path / "tensorboard").exists()


def test_a_folder_that_is_unwritable_for_a_while_loses_lines_without_a_traceback(tmp_path, capfd):
    _write_config(tmp_path)
    metrics = Metrics(tmp_path, step=0, loggers=[TensorBoard(tmp_path)])
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
    metrics = Metrics(tmp_path, step=0)
    for step in (1, 2, 3):
        metrics.write(step, {"train/loss": 1.0})

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as disk:
        disk.setattr("relora_mora.train.log.report.write_synced", full)
        metrics.go_back(1)
        metrics.write(2, {"train/loss": 2.0})
    metrics.write(3, {"train/loss": 3.0})
    metrics.close()
    assert [(line["step"], line["train/loss"]) for line in _lines(tmp_path)] == [(1, 1.0), (3, 3.0)]


def after_a_power_cut(config: Any) -> dict[str, str]:
    """Trains; what of ``metrics.jsonl`` would have survived a power cut as each checkpoint got its name, and as the end
    was recorded."""
    from relora_mora.checkpoint import writer
    from relora_mora.supervise import guard
    from relora_mora.train.pretrain import pretrain

    path = Path(config.train.run_dir) / "metrics.jsonl"
    found: dict[str, str] = {}
    survives = ""
    fsync, put_in_place, record_end = os.fsync, writer.layout.put_in_place, guard.exits.record_end

    def sync(handle: int) -> None:
        nonlocal survives
        fsync(handle)
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            survives = path.read_text()

    def name(folder: Path) -> None:
        found[folder.name] = survives
        put_in_place(folder)

    def end(*args: Any, **how: Any) -> None:
        found["end"] = survives
        record_end(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        patch.setattr(writer.layout, "put_in_place", name)
        patch.setattr(guard.exits, "record_end", end)
        pretrain(config)
    return found


@pytest.mark.more
@pytest.mark.distributed
def test_a_power_cut_loses_no_line_before_a_checkpoint_or_the_end(pools, inputs, tokenizer_path, tmp_path):
    """Else the same command would not evaluate again, and the evaluation would be lost for good."""
    config = run_config(inputs, tokenizer_path, tmp_path / "run", checkpoint={"every_steps": 5})
    [found] = pools(1)(after_a_power_cut, config)
    assert found.keys() == {"step-00000005.new", "step-00000010.new", "end"}
    for step in (5, 10):
        lines = [json.loads(line) for line in found[f"step-{step:08d}.new"].splitlines()]
        assert [line["step"] for line in lines if "eval/loss" in line][-1] == step
    assert [json.loads(line) for line in found["end"].splitlines()] == metrics_of(tmp_path / "run")


def test_metrics_that_a_disk_rejects_are_reported_once_and_do_not_end_the_run(tmp_path, monkeypatch, capfd):
    metrics = Metrics(tmp_path, step=0)
    metrics.write(1, {"train/loss": 1.0})
    setup_logging(0)

    def full(handle: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    metrics.sync()
    metrics.close()
    assert capfd.readouterr().err.count("metrics.jsonl: metrics cannot be written (Disk quota exceeded)") == 1


def test_corrupt_bytes_lose_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\xff\x00p": 2}\n{"step": 3}\n')
    Metrics(tmp_path, step=5).close()
    assert [line["step"] for line in _lines(tmp_path)] == [1, 3]


def test_the_first_rank_logs_what_concerns_all_ranks(capsys):
    for rank, shown in ((0, True), (1, False)):
        setup_logging(rank)
        shared_log.warning("skipped")
        log.warning("a bad line in my shard")
        errors = capsys.readouterr().err
        assert ("skipped" in errors) is shown
        assert "a bad line in my shard" in errors
    setup_logging(0)


def test_groups_of_curves_come_in_the_order_of_reading():
    """TensorBoard sorts groups by name and opens the first two."""
    tags = [
        "eval/perplexity",
        "eval/seconds",
        "eval/seconds/loss",  # of a set of this name
        "eval/c4/perplexity",
        "train/loss",
        "train/lr_norms",
        "train/tokens",
        "train/tokens/web",
        "train/epoch/web",
        "perf/mfu",
        "perf/data_bad_lines",
        "perf/data_wait_seconds",
        "merge/delta_norm/q_proj",
        "startup/seconds",
    ]
    shown = [board_tag(tag) for tag in tags]
    assert sorted({tag.partition("/")[0] for tag in shown}) == [
        "eval",
        "train",
        "training data",
        "training merges",
        "training speed",
    ]
    assert len(set(shown)) == len(tags)
    groups = dict(zip(tags, (tag.partition("/")[0] for tag in shown), strict=True))
    assert {groups["eval/seconds/loss"], groups["eval/c4/perplexity"]} == {"eval"}
    assert {groups["train/tokens/web"], groups["train/epoch/web"]} == {"training data"}
    for tag in ("merge/layers", "eval/tokens", "eval/c4/tokens", "eval/c4/answers", "startup/imports_seconds"):
        assert board_tag(tag) is None, "no curve"


def test_custom_charts_name_curves_that_exist():
    written = {
        board_tag(tag)
        for tag in (*(f"{side}/{what}" for side in ("eval", "train") for what in ("loss", "perplexity")),)
    }
    written |= {board_tag(f"merge/{what}/q_proj") for what in ("delta_norm", "effective_rank")}
    patterns = [pattern for charts in LAYOUT.values() for _, patterns in charts.values() for pattern in patterns]
    assert len(patterns) == 6
    for pattern in patterns:
        assert any(re.fullmatch(pattern, tag) for tag in written), pattern
    of_sets = ["eval/c4/loss", "eval/c4/perplexity", "eval/loss/perplexity"]
    charts = [{tag for tag in of_sets for pattern in two if re.match(pattern, tag)} for two in _quality()]
    assert charts == [{"eval/c4/perplexity", "eval/loss/perplexity"}, {"eval/c4/loss"}]


def _quality():
    """The patterns of the charts of perplexity and loss; TensorBoard looks for them at the start of a tag."""
    return [patterns for _, patterns in LAYOUT["quality"].values()]


@pytest.mark.parametrize(("method", "uses_rank"), [("remora", True), ("full", False)])
def test_runs_are_compared_by_settings_that_their_method_uses(tmp_path, method, uses_rank):
    _write_config(tmp_path, method={"name": method}, optim={"lr": 0.25})
    Metrics(tmp_path, step=0, loggers=[TensorBoard(tmp_path)]).close()
    events = _events(tmp_path)
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hyperparameters = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hyperparameters["method.name"].string_value == method
    assert hyperparameters["optim.lr"].number_value == 0.25
    assert ("method.rank" in hyperparameters) is uses_rank
    assert "run/config/text_summary" in events.Tags()["tensors"]


def _shown(values: list[float]) -> tuple[float, float]:
    """Between which values TensorBoard's chart has its points, "Ignore outliers in chart scaling" being on."""
    ordered = sorted(values)
    if len(ordered) < 3:
        return ordered[0], ordered[-1]
    return ordered[math.ceil(0.05 * (len(ordered) - 1))], ordered[math.floor(0.95 * (len(ordered) - 1))]


@pytest.mark.parametrize("evaluations", [2, 4, 9])
@pytest.mark.parametrize("start", [None, "models/base"])
def test_the_best_of_a_few_evaluations_is_shown(tmp_path, evaluations, start):
    _write_config(tmp_path, model={"init_from": start})
    metrics = Metrics(tmp_path, step=0, loggers=[TensorBoard(tmp_path)])
    values = [8529.0, *(600.0 - 50 * number for number in range(evaluations))]
    for number, value in enumerate(values):
        metrics.write(50 * number, {"eval/perplexity": value})
    metrics.close()
    highest = values[1] if start is None else values[0]  # of random weights it tells nothing, and hides the others
    assert _shown([value for _, value in _board(tmp_path, "eval/perplexity")]) == (values[-1], highest)
    assert [line["eval/perplexity"] for line in _lines(tmp_path)] == values


def test_a_new_start_shows_no_points_of_the_previous_one(tmp_path):
    for rate in (0.5, 0.25):
        _write_config(tmp_path, optim={"lr": rate})
        metrics = Metrics(tmp_path, step=0, loggers=[TensorBoard(tmp_path)])
        metrics.write(0, {"eval/loss": 10 * rate})
        metrics.close()
    content = _events(tmp_path).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hyperparameters = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hyperparameters["optim.lr"].number_value == 0.25
    assert _board(tmp_path, "eval/loss") == [(0, 2.5)]
    assert len(list((tmp_path / "tensorboard").glob("abandoned-events.*"))) == 1


def test_the_documents_say_which_numbers_are_not_curves():
    text = (ROOT / "docs" / "metrics.md").read_text()
    only_in_file = text.partition("Some tags are only in `metrics.jsonl`.")[2].partition("\n\n")[0]
    tags = set(re.findall(r"`((?:train|eval|merge)/[a-z_]+)`", only_in_file))
    texts = {"train/skipped_data", "eval/digest"}
    assert {tag for tag in tags if board_tag(tag) is None} == tags - texts
    assert tags == {*NO_CURVES, *texts}
