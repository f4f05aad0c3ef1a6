"""Between a stop and a resume nothing is lost: place in the data, what was about to happen, what there is to go back
to."""

from typing import Any

import pytest

from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.checkpoint.reader import find_checkpoint
from relora_mora.system.run_folder import read_json_lines
from tests.tools.runs import checkpoint_at, copy_cut_at, different_tensors, logged_steps, manifest_at, metrics, train
from tests.train.state.faults import faulty, rollbacks

pytestmark = pytest.mark.distributed


def stopped(config: Any, *, where: str = "start") -> int:
    """Trains on every rank until rank 1 is asked to stop, at the start or in the last evaluation. Returns the exit
    code, as a signal would give it."""
    from relora_mora.supervise.guard import Guard
    from relora_mora.train.loop.evaluating import Evaluating
    from relora_mora.train.pretrain import pretrain

    guard = Guard(signals=False)
    evaluate = Evaluating.evaluate

    def ask(rank: int) -> None:
        if rank == 1:
            guard.stop_reason = "the test"

    def in_the_last_evaluation(self: Evaluating, state: Any) -> None:
        if state.step == self.config.train.steps:
            ask(self.engine.rank)
        evaluate(self, state)

    with pytest.MonkeyPatch.context() as patch:
        if where == "start":
            guard.stop_reason = "the test"
        else:
            patch.setattr(Evaluating, "evaluate", in_the_last_evaluation)
        return pretrain(config, guard)


@pytest.mark.more
def test_a_resume_in_a_new_folder_that_stops_before_its_first_step_keeps_its_data_position(runs, pools, tmp_path):
    never, first, second = (tmp_path / name for name in ("never", "first", "second"))
    runs.train(never, 2)
    copy_cut_at(never, first, 5)
    taken = runs.config(second, 2, train={"resume": str(first)})
    assert pools(2)(stopped, taken) == [75, 75]
    assert manifest_at(second, 5)["data_state"] == manifest_at(first, 5)["data_state"]
    runs.train(second, 2)
    assert different_tensors(*(checkpoint_at(folder, 10) for folder in (never, second))) == []


def test_a_resume_that_cannot_be_allowed_is_refused_and_moves_no_checkpoint(runs, tmp_path):
    run = tmp_path / "run"
    runs.train(run, stop_after=6, method={"merge_every": 2})
    checkpoints = sorted((run / "checkpoints").iterdir())
    for section, setting, value, expected in (
        ("method", "merge_every", 5, "has made 2 merges and has operator 1; with these settings it would be 0 and 1"),
        (
            "method",
            "operators",
            [2, 1],
            "has made 2 merges and has operator 1; with these settings it would be 2 and 2",
        ),
        ("train", "steps", 3, "train.steps: the checkpoint is already at step 4"),
    ):
        given = {"resume": str(checkpoint_at(run, 4)), "allow_changes": [f"{section}.{setting}"]}
        back: dict[str, dict[str, Any]] = {"train": given, "method": {"merge_every": 2}}
        back[section][setting] = value
        message = runs.refusal(runs.config(run, **back))
        assert expected in message
        assert "step-00000004" in message
        assert sorted((run / "checkpoints").iterdir()) == checkpoints


@pytest.mark.more
def test_a_resume_repeats_a_last_evaluation_that_was_stopped_and_saves_no_step_twice(runs, pools, tmp_path):
    settings = {"eval": {"every_steps": 5, "at_start": False}, "checkpoint": {"keep_best": "eval/loss"}}
    config = runs.config(tmp_path / "run", 2, **settings)
    assert pools(2)(stopped, config, where="evaluation") == [75, 75]
    assert logged_steps(tmp_path / "run", "eval/loss") == [5]
    assert find_checkpoint(tmp_path / "run" / "best").name == "step-00000005"
    for _ in range(2):
        pools(2)(train_without_text, config)
        assert logged_steps(tmp_path / "run", "eval/loss") == [5, 10]
        assert find_checkpoint(tmp_path / "run" / "checkpoints" / "best").name == "step-00000010"
        assert logged_steps(tmp_path / "run", "perf/checkpoint_stall_seconds") == list(range(1, 11))


def test_the_best_checkpoint_is_kept(runs, tmp_path):
    """The rate gets so high that the loss rises."""
    folder = tmp_path / "run"
    settings = {"optim": {"lr": 9.0, "lr_other": 9.0, "warmup_steps": 50, "clip": 1e6}, "eval": {"every_steps": 1}}
    best = {"every_steps": 3, "keep_last": 1, "keep_best": "eval/loss"}
    for stop in (3, 6, None):
        runs.train(folder, stop_after=stop, **settings, checkpoint=best)
    loss = {line["step"]: line["eval/loss"] for line in metrics(folder) if line["step"] and "eval/loss" in line}
    step = min(loss, key=loss.__getitem__)
    assert step < 9, "a later checkpoint would be kept anyway"
    assert find_checkpoint(folder / "best") == checkpoint_at(folder, step)
    assert sorted((folder / "checkpoints").glob("step-*")) == [checkpoint_at(folder, each) for each in (step, 10)]
    again = {"steps": 11, "allow_changes": ["train.steps"], "resume": str(folder / "best")}
    # without a metric, what was the best is removed, and the same command goes on from what it saved
    for _ in range(2):
        runs.train(folder, **settings, checkpoint={"keep_last": 1}, train=again)
        assert sorted((folder / "checkpoints").glob("step-*")) == [checkpoint_at(folder, 11)]
    with pytest.raises(CheckpointError, match=r"checkpoint\.keep_best"):
        find_checkpoint(folder / "best")


def train_without_text(config: Any) -> None:
    from relora_mora.train.loop.step import BatchLoader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLoader, "next_batch", lambda *_: pytest.fail("no step is left that needs a batch"))
        train(config)


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
