"""Which checkpoints and rollbacks of a run folder belong to the history that goes on there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from relora_mora.system.run_folder import RunFolder, changes_since_first, noted_digests, read_json_lines
from tests.tools.runs import checkpoint_at, logged_steps, metrics, run_config, train
from tests.train.state.faults import NAN, fault_settings, faulty, same_run

pytestmark = pytest.mark.distributed


def rollbacks(folder: Path) -> list[tuple[int, int]]:
    return [(entry["step"], entry["at"]) for entry in json.loads((folder / "rollbacks.json").read_text())]


@pytest.mark.more
def test_a_kill_after_a_rollback_on_other_data_changes_nothing(pools, inputs, tokenizer_path, tmp_path):
    def on_other_data(folder: Path) -> Any:
        config = fault_settings(folder, inputs, tokenizer_path, allow_changes=["data.seed"])
        return config.model_copy(update={"data": config.data.model_copy(update={"seed": 5})})

    reference, killed = tmp_path / "reference", tmp_path / "killed"
    pools(2)(train, fault_settings(reference, inputs, tokenizer_path), stop_after=3)
    shutil.copytree(reference, killed)
    pools(2)(faulty, on_other_data(reference), {}, drop=(4, 5))
    pools(2)(faulty, on_other_data(killed), NAN, stop_at=(1, 4))
    assert rollbacks(killed) == [(3, 5)]
    assert pools(2)(faulty, on_other_data(killed), {}) == ["", ""]  # what is skipped is not read, however good
    assert same_run(killed, reference)


@pytest.mark.more
def test_a_rollback_does_not_apply_to_data_that_changed_after_it(pools, inputs, tokenizer_path, tmp_path):
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    pools(2)(train, fault_settings(reference, inputs, tokenizer_path), stop_after=3)
    pools(2)(faulty, fault_settings(killed, inputs, tokenizer_path), NAN, stop_at=(1, 4))
    assert rollbacks(killed) == [(3, 5)]
    for folder in (reference, killed):
        config = fault_settings(folder, inputs, tokenizer_path, allow_changes=["data.seed"])
        pools(2)(train, config.model_copy(update={"data": config.data.model_copy(update={"seed": 5})}))
    assert same_run(killed, reference)


@pytest.mark.more
def test_rollbacks_of_a_moved_run_do_not_apply_to_a_new_one(pools, inputs, tokenizer_path, tmp_path):
    clean, folder = tmp_path / "clean", tmp_path / "run"
    pools(2)(faulty, fault_settings(clean, inputs, tokenizer_path), {})
    pools(2)(faulty, fault_settings(folder, inputs, tokenizer_path), NAN)
    assert rollbacks(folder) == [(3, 5)]
    shutil.rmtree(folder / "checkpoints")
    pools(2)(train, fault_settings(folder, inputs, tokenizer_path), stop_after=3)
    assert pools(2)(faulty, fault_settings(folder, inputs, tokenizer_path), {}) == ["", ""]
    assert not (folder / "rollbacks.json").exists()
    assert same_run(folder, clean)


@pytest.mark.more
@pytest.mark.parametrize("began", ["by itself", "there", "there, and goes on by auto"])
def test_a_start_from_a_named_checkpoint_with_other_settings_moves_nothing(
    pools, inputs, tokenizer_path, tmp_path, began
):
    theirs, folder = tmp_path / "theirs", tmp_path / "run"
    pools(1)(train, run_config(inputs, tokenizer_path, theirs), stop_after=2)
    there = {"resume": str(theirs)}
    pools(1)(
        train, run_config(inputs, tokenizer_path, folder, train={} if began == "by itself" else there), stop_after=3
    )
    if began.endswith("auto"):
        pools(1)(train, run_config(inputs, tokenizer_path, folder), stop_after=4)
    before = sorted(folder.rglob("*"))
    with pytest.raises(Exception, match=r"holds checkpoints of a start with other settings; train\.resume=auto "):
        pools(1)(
            train, run_config(inputs, tokenizer_path, folder, train={**there, "micro_batch_size": 1}), stop_after=5
        )
    assert sorted(folder.rglob("*")) == before


@pytest.mark.more
def test_a_run_begins_from_a_named_checkpoint_only_once(pools, inputs, tokenizer_path, tmp_path):
    """The same command continues from what it has saved, since a requeued job has no other command."""
    theirs, folder = tmp_path / "theirs", tmp_path / "run"
    pools(1)(train, run_config(inputs, tokenizer_path, theirs), stop_after=2)
    begin = run_config(inputs, tokenizer_path, folder, train={"resume": str(checkpoint_at(theirs, 2))})
    pools(1)(train, begin, stop_after=4)
    pools(1)(train, begin, stop_after=5)
    assert [json.loads(line)["step"] for line in (folder / "starts.jsonl").read_text().splitlines()] == [2, 4]
    back = run_config(inputs, tokenizer_path, folder, train={"resume": str(checkpoint_at(folder, 3))})
    pools(1)(train, back, stop_after=4)
    pools(1)(train, back, stop_after=5)
    assert [json.loads(line)["step"] for line in (folder / "starts.jsonl").read_text().splitlines()] == [2, 4, 3, 4]
    found = {path.name for path in (folder / "checkpoints").glob("*step*")}
    assert found == {*(f"step-0000000{step}" for step in (2, 3, 4, 5)), *(f"abandoned-step-0000000{n}" for n in (4, 5))}


@pytest.mark.more
@pytest.mark.parametrize("named", ["another run", "a checkpoint of its own"])
def test_the_same_command_continues_a_run_whose_folder_was_removed(pools, inputs, tokenizer_path, tmp_path, named):
    """It leaves only a checkpoint there."""
    theirs, folder = tmp_path / "theirs", tmp_path / "run"
    checkpoints = folder / "checkpoints"
    pools(1)(train, run_config(inputs, tokenizer_path, theirs), stop_after=2)
    begin = theirs
    if named == "a checkpoint of its own":
        begin = checkpoints / "step-00000002"
        pools(1)(train, run_config(inputs, tokenizer_path, folder), stop_after=3)
    config = run_config(inputs, tokenizer_path, folder, train={"resume": str(begin)})
    pools(1)(train, config, stop_after=4)
    for path in (*folder.iterdir(), *checkpoints.iterdir()):
        if path not in (checkpoints, checkpoints / "step-00000004"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    pools(1)(train, config, stop_after=5)
    assert [line["step"] for line in read_json_lines(folder / "starts.jsonl")] == [4]


@pytest.mark.more
def test_a_run_does_not_start_again_next_to_abandoned_checkpoints(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    pools(1)(train, run_config(inputs, tokenizer_path, folder), stop_after=1)
    for path in (folder / "checkpoints").glob("step-*"):
        path.rename(path.with_name(f"abandoned-{path.name}"))
    with pytest.raises(Exception, match=r"holds abandoned-step-00000001 and no other checkpoint; name one in train.re"):
        pools(1)(train, run_config(inputs, tokenizer_path, folder), stop_after=2)


@pytest.mark.more
def test_nothing_of_an_abandoned_history_is_lost(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    pools(1)(train, run_config(inputs, tokenizer_path, folder), stop_after=3)
    kept = folder / "checkpoints"
    for name in ("step-00000002", "step-00000001"):
        pools(1)(train, run_config(inputs, tokenizer_path, folder, train={"resume": str(kept / name)}), stop_after=3)
        (kept / "step-00000003" / "mark").write_text(name)
    assert not (kept / "abandoned-step-00000003" / "mark").exists()
    assert (kept / "abandoned-2-step-00000003" / "mark").read_text() == "step-00000002"
    names = ("metrics.jsonl", "starts.jsonl", "tasks.jsonl")
    (folder / "tasks.jsonl").write_text('{"step": 3}\n')  # as relora-mora evaluate --tasks leaves it
    before = [(folder / name).read_text() for name in names]
    given = {"resume": str(kept / "abandoned-2-step-00000003")}
    pools(1)(train, run_config(inputs, tokenizer_path, folder, train=given), stop_after=4)
    assert (kept / "abandoned-3-step-00000003" / "mark").read_text() == "step-00000001"
    assert [(folder / f"abandoned-{name}").read_text() for name in names] == before
    assert [line["step"] for line in read_json_lines(folder / "starts.jsonl")] == [0, 2, 3]  # not that at step 1


@pytest.mark.more
def test_a_run_that_goes_back_to_an_abandoned_checkpoint_knows_its_history(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    kept = folder / "checkpoints"

    def start(stop_after: int, lr: float, **given: Any) -> None:
        given["allow_changes"] = ["optim.lr"]
        config = run_config(inputs, tokenizer_path, folder, optim={"lr": lr}, train=given)
        pools(1)(train, config, stop_after=stop_after)

    start(2, 0.02)
    start(4, 0.25)
    starts = RunFolder(folder).starts
    before = read_json_lines(starts)
    start(3, 0.5, resume=str(kept / "step-00000001"))
    assert [step for step, _ in changes_since_first(read_json_lines(starts))] == [1]
    for _ in range(2):  # again after a kill before the first checkpoint of its own
        start(4, 0.25, resume=str(kept / "abandoned-step-00000004"))
        shutil.rmtree(kept / "step-00000004")
    now = read_json_lines(starts)
    assert now[:2] == before
    assert [line["step"] for line in now] == [0, 2, 4]
    assert noted_digests(now) == noted_digests(before) != {}
    assert changes_since_first(now) == changes_since_first(before) != []


@pytest.mark.more
def test_a_run_that_begins_from_a_checkpoint_saves_one_immediately(pools, inputs, tokenizer_path, tmp_path):
    theirs, folder = tmp_path / "theirs", tmp_path / "run"
    pools(1)(train, run_config(inputs, tokenizer_path, theirs), stop_after=5)
    given = {"resume": str(theirs), "max_bad_steps": 2}
    begin = run_config(inputs, tokenizer_path, folder, train=given, checkpoint={"every_steps": 100})
    assert pools(1)(faulty, begin, {7: float("nan"), 8: float("nan")}, rank=0) == [""]  # and goes back to it
    assert rollbacks(folder) == [(5, 8)]
    assert logged_steps(folder, "eval/loss") == [5, 10]


@pytest.mark.more
def test_a_checkpoint_without_its_last_rename_belongs_to_the_history(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    config = run_config(inputs, tokenizer_path, folder)
    pools(1)(train, config, stop_after=3)
    newest = checkpoint_at(folder, 3)
    newest.rename(newest.with_name(f"{newest.name}.new"))
    before = metrics(folder)
    pools(1)(train, config, stop_after=4)
    assert metrics(folder)[: len(before)] == before
    assert not list((folder / "checkpoints").glob("abandoned-*"))
    assert newest.is_dir()


@pytest.mark.more
def test_a_run_shortened_to_its_current_step_is_evaluated(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    mora = {"method": {"name": "mora"}}
    pools(1)(train, run_config(inputs, tokenizer_path, folder, **mora), stop_after=3)
    given = {"steps": 3, "allow_changes": ["train.steps"]}
    pools(1)(train, run_config(inputs, tokenizer_path, folder, train=given, **mora))
    assert logged_steps(folder, "eval/loss") == [0, 3]


@pytest.mark.more
def test_an_earlier_start_without_steps_is_moved_aside(pools, inputs, tokenizer_path, tmp_path):
    theirs, folder = tmp_path / "theirs", tmp_path / "run"
    pools(1)(train, run_config(inputs, tokenizer_path, theirs), stop_after=2)
    folder.mkdir()
    for step in (0, 2):  # started again, then from a checkpoint; neither made a step
        (folder / "starts.jsonl").write_text(json.dumps({"step": step, "epochs": None}) + "\n")
        given = {} if step else {"resume": str(theirs)}
        pools(1)(train, run_config(inputs, tokenizer_path, folder, train=given), stop_after=3)
        assert [line["step"] for line in read_json_lines(folder / "starts.jsonl")] == [2 - step]
        shutil.rmtree(folder / "checkpoints")


@pytest.mark.more
def test_metrics_of_a_run_whose_checkpoints_were_removed_are_moved_aside(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    config = run_config(inputs, tokenizer_path, folder)
    pools(1)(train, config, stop_after=2)
    before = (folder / "metrics.jsonl").read_text()
    shutil.rmtree(folder / "checkpoints")
    pools(1)(train, config, stop_after=2)
    assert (folder / "abandoned-metrics.jsonl").read_text() == before
    assert json.loads((folder / "starts.jsonl").read_text())["step"] == 0
