"""What can be read from a run folder: tokens, held-out sets, and whether the run has finished."""

import json
import os
from pathlib import Path

import pytest

from relora_mora.experiments.compare.groups import group_runs
from relora_mora.experiments.compare.runs import CompareError, read_run, run_folders
from relora_mora.system.run_folder import RunFolder
from tests.experiments.compare.folders import TOKENS, write_run
from tests.tools.each import each


@each("begins", [0, 100])
def test_tokens_of_a_step(tmp_path: Path, begins: int) -> None:
    """The tokens before another run's checkpoint count."""
    folder = write_run(tmp_path / "a", [9.0, 4.0])
    files = RunFolder(folder)
    lines = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    for line in lines:
        line["step"] += begins
        if "train/tokens" in line:
            line["train/tokens"] += begins * TOKENS
    files.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    # beyond the last line, which is of step 10, it follows from the batch
    assert [run.tokens(begins + step) for step in (0, 7, 10, 13)] == [
        (begins + step) * TOKENS for step in (0, 7, 10, 13)
    ]


def test_evaluations_on_other_text_before_a_resume_are_left_out(tmp_path: Path) -> None:
    """Even if it has the same number of tokens, or is one of several sets now."""
    folder = write_run(tmp_path / "a", [9.0, 4.0], sets=["web"], digest="a text")
    with RunFolder(folder).metrics.open("a") as stream:
        for step in (20, 30):
            line = {"eval/loss": 3.0, "eval/tokens": 500, "eval/digest": "another"}
            line |= {"eval/web/loss": 2.0, "eval/web/tokens": 500, "eval/web/digest": "a text"}
            stream.write(json.dumps({"step": step, **line}) + "\n")
    run = read_run(folder)
    assert run.evaluations("").to_dict() == {20: 3.0, 30: 3.0}
    assert run.evaluations("web").to_dict() == {0: 9.0, 10: 4.0, 20: 2.0, 30: 2.0}
    assert run.scored("web", "digest") == "a text"
    assert run.scored("", "tokens") == 500


@each(("sets", "expected"), [((), [""]), (("web", "loss"), ["web", "loss"])])
def test_sets_of_held_out_text_are_those_of_the_newest_evaluation(
    tmp_path: Path, sets: tuple[str, ...], expected: list[str]
) -> None:
    """A resume may continue with other text."""
    folder = write_run(tmp_path / "a", [9.0, 4.0], sets=sets)
    run = read_run(folder)
    assert run.validation_sets == expected
    assert list(run.evaluations(expected[-1])) == [loss + len(expected) for loss in (8.0, 3.0)]
    with RunFolder(folder).metrics.open("a") as stream:
        stream.write('{"step": 20, "eval/loss": 3.0, "eval/new/loss": 2.0, "eval/web/loss": 4.0}\n')
    [group] = group_runs([read_run(folder)])
    assert group.runs[0].validation_sets == ["new", "web"]
    assert [group.last(name) for name in ("new", "web")] == [[(20, 2.0)], [(20, 4.0)]]


def test_non_finite_numbers_and_a_truncated_line_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [9.0, 4.0])
    with RunFolder(folder).metrics.open("a") as stream:
        stream.write('{"step": 11, "train/loss": null}\n{"step": 12, "train/lo')
    assert max(read_run(folder).series("train/loss").index) == 10
    assert read_run(folder).last_step == 11


def test_the_runs_of_a_study_are_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs" / name, [9.0]) for name in ("b", "c", "a")]
    for time, run in enumerate(runs):
        os.utime(RunFolder(run).config, (time, time))
    (tmp_path / "runs/refused").mkdir()
    assert run_folders(tmp_path) == runs
    assert run_folders(runs[0]) == runs[:1]
    assert run_folders(tmp_path / "runs") == [tmp_path / "runs"]


def test_paths_without_a_run_are_reported(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=r"not a run folder, because it has no config\.yaml"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "a", [9.0])
    RunFolder(folder).metrics.write_text("")
    with pytest.raises(CompareError, match="no metrics yet"):
        read_run(folder)
    RunFolder(folder).metrics.write_text('{"step": 0}\n')
    for text in ("- a list", "a: {b: c", "method: {name: full}", "train:\n"):
        RunFolder(folder).config.write_text(text)
        with pytest.raises(CompareError, match=r"config\.yaml: (cannot be read|not the settings of a run)"):
            read_run(folder)
