"""Which checkpoints and records of a run folder belong to the history that goes on there."""

from __future__ import annotations

import json

import pytest

from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.system.run_folder import RunFolder, read_json_lines
from relora_mora.train.begin.run_folder import start_records
from relora_mora.train.state.resume import where_to_resume
from tests.tools.each import each
from tests.tools.runs import checkpoint_at, logged_steps, train
from tests.train.state.faults import faulty, rollbacks

pytestmark = pytest.mark.distributed


@pytest.mark.more
def test_a_run_begins_from_a_named_checkpoint_only_once(runs, pools, tmp_path):
    """The same command continues from what it has saved, since a requeued job has no other command."""
    theirs, folder = tmp_path / "theirs", tmp_path / "run"
    runs.train(theirs, stop_after=2)
    begin = runs.config(folder, train={"resume": str(checkpoint_at(theirs, 2))})
    pools(1)(train, begin, stop_after=4)
    pools(1)(train, begin, stop_after=5)
    assert [line["step"] for line in read_json_lines(folder / "starts.jsonl")] == [2, 4]
    before = sorted(folder.rglob("*"))
    with pytest.raises(Exception, match=r"holds checkpoints of a start that did not begin there; train\.resume=auto "):
        runs.train(folder, train={"resume": str(theirs)})
    assert sorted(folder.rglob("*")) == before
    back = runs.config(folder, train={"resume": str(checkpoint_at(folder, 3))})
    pools(1)(train, back, stop_after=4)
    pools(1)(train, back, stop_after=5)
    assert [line["step"] for line in read_json_lines(folder / "starts.jsonl")] == [2, 4, 3, 4]
    found = {path.name for path in (folder / "checkpoints").glob("*step*")}
    assert found == {*(f"step-0000000{step}" for step in (2, 3, 4, 5)), *(f"abandoned-step-0000000{n}" for n in (4, 5))}


def test_a_run_does_not_start_again_next_to_abandoned_checkpoints(runs, tmp_path):
    (tmp_path / "run" / "checkpoints" / "abandoned-step-00000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds abandoned-step-00000001 and no other checkpoint; name one in tr"):
        where_to_resume(runs.config(tmp_path / "run"))


@pytest.mark.more
def test_nothing_of_an_abandoned_history_is_lost_or_mixed_with_another(runs, tmp_path):
    folder = tmp_path / "run"
    runs.train(folder, stop_after=3)
    kept = folder / "checkpoints"
    for name in ("step-00000002", "step-00000001"):
        runs.train(folder, stop_after=3, train={"resume": str(kept / name)})
        (kept / "step-00000003" / "mark").write_text(name)
    assert not (kept / "abandoned-step-00000003" / "mark").exists()
    assert (kept / "abandoned-2-step-00000003" / "mark").read_text() == "step-00000002"
    names = ("metrics.jsonl", "starts.jsonl", "tasks.jsonl")
    (folder / "tasks.jsonl").write_text('{"step": 3}\n')  # as relora-mora evaluate --tasks leaves it
    before = [(folder / name).read_text() for name in names]
    given = {"resume": str(kept / "abandoned-2-step-00000003")}
    runs.train(folder, stop_after=4, train=given)
    assert (kept / "abandoned-3-step-00000003" / "mark").read_text() == "step-00000001"
    assert [(folder / f"abandoned-{name}").read_text() for name in names] == before
    assert [line["step"] for line in read_json_lines(folder / "starts.jsonl")] == [3]
    assert logged_steps(folder) == [4]


@pytest.mark.more
def test_a_run_that_begins_from_a_checkpoint_saves_one_immediately(runs, pools, tmp_path):
    theirs, folder = tmp_path / "theirs", tmp_path / "run"
    runs.train(theirs, stop_after=5)
    given = {"resume": str(theirs), "max_bad_steps": 2}
    begin = runs.config(folder, train=given, checkpoint={"every_steps": 100})
    assert pools(1)(faulty, begin, {7: float("nan"), 8: float("nan")}, rank=0) == [""]  # and goes back to it
    assert rollbacks(folder) == [(5, 8)]
    assert logged_steps(folder, "eval/loss") == [5, 10]


@each(("step", "is_moved"), [(0, False), (2, True)])
def test_records_of_a_start_that_made_steps_are_moved_aside(tmp_path, step, is_moved):
    starts = RunFolder(tmp_path).starts
    starts.write_text(json.dumps({"step": step, "epochs": None}) + "\n")
    start_records(RunFolder(tmp_path))
    assert starts.exists() is not is_moved
    assert (tmp_path / "abandoned-starts.jsonl").exists() is is_moved
