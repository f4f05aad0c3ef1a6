"""The steps at which a metric reaches values."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_mora.experiments.compare.groups import Group, group_runs
from relora_mora.experiments.compare.reach import parse_reach, reach_notes, step_cells
from relora_mora.experiments.compare.runs import CompareError, read_run
from tests.experiments.compare.folders import append_metrics, write_run

ACCURACY = "eval/character_accuracy"


def _runs(tmp_path: Path, *curves: list[float]) -> list[Group]:
    """A group whose runs have these accuracies at steps 0, 100, ..."""
    found = []
    for seed, accuracies in enumerate(curves):
        folder = write_run(tmp_path / str(seed), [5.0, 4.0], train={"seed": seed})
        append_metrics(folder, ACCURACY, accuracies)
        found.append(read_run(folder))
    return group_runs(found)


def test_the_first_step_counts_and_seeds_are_a_mean_with_its_range(tmp_path: Path):
    groups = _runs(tmp_path, [0.0, 0.6, 0.4, 1.0], [0.0, 0.1, 0.2, 0.9])
    reach = parse_reach(f"{ACCURACY}=0.5,0.95,1.5", groups)
    assert step_cells(reach, groups) == {
        "character accuracy 0.5, step": ["200 (100–300)"],
        "character accuracy 0.95, step": ["300; 1 of 2 runs"],
        "character accuracy 1.5, step": ["not reached"],
        "character accuracy at the end": ["0.950 (0.900–1.000)"],
    }


def test_a_mean_step_between_two_is_shown_as_it_is(tmp_path: Path):
    def cell(*curves: list[float]) -> str:
        folder = tmp_path / str(len(curves))
        groups = _runs(folder, *curves)
        for group in groups:
            for run in group.runs:
                run.lines[:] = [{**line, "step": line["step"] // 100} for line in run.lines]
        return step_cells(parse_reach(f"{ACCURACY}=0.5", groups), groups)["character accuracy 0.5, step"][0]

    early, late = [0.0, 0.6], [0.0, 0.1, 0.6]
    assert cell(early, late) == "1.5 (1–2)"
    assert cell(early, early, late) == "1.3 (1–2)"


def test_seeds_of_unequal_progress_end_at_the_last_common_step(tmp_path: Path):
    groups = _runs(tmp_path, [0.0, 0.5, 0.9], [0.0, 0.3])
    cells = step_cells(parse_reach(f"{ACCURACY}=0.5", groups), groups)
    assert cells["character accuracy at the end"] == ["0.400 (0.300–0.500)"]


def test_a_falling_metric_reaches_values_below_its_first(tmp_path: Path):
    folder = write_run(tmp_path / "run", [5.0, 4.0])
    append_metrics(folder, "eval/errors", [9.0, 5.0, 3.0])
    groups = group_runs([read_run(folder)])
    assert step_cells(parse_reach("eval/errors=4", groups), groups)["errors 4, step"] == ["200"]


def test_a_value_reached_by_the_first_number_is_reached(tmp_path: Path):
    """For example in a run that began at another run's checkpoint."""
    groups = _runs(tmp_path, [0.7, 0.8])
    assert step_cells(parse_reach(f"{ACCURACY}=0.5", groups), groups)["character accuracy 0.5, step"] == ["0"]
    assert step_cells(parse_reach("eval/loss=6", groups), groups)["loss 6, step"] == ["0"]


def test_shares_of_unequal_numbers_of_answers_are_reported(tmp_path: Path):
    folders = [write_run(tmp_path / f"{seed}", [5.0, 4.0], train={"seed": seed}) for seed in (0, 1)]
    for folder, answers in zip(folders, (7, 3), strict=True):
        append_metrics(folder, ACCURACY, [0.5, 0.5])
        append_metrics(folder, "eval/answers", [5, answers])  # a resume changed it
    for count, expected in ((1, 0), (2, 1)):
        groups = group_runs(map(read_run, folders[:count]))
        assert len(reach_notes(parse_reach(f"{ACCURACY}=0.5", groups), groups)) == expected
        assert reach_notes(parse_reach("eval/loss=4", groups), groups) == []


@pytest.mark.parametrize("text", ["eval/loss", "eval/loss=", "eval/loss=a"])
def test_text_without_a_metric_and_numbers_is_refused(tmp_path: Path, text: str):
    with pytest.raises(CompareError, match="expected a metric and numbers"):
        parse_reach(text, _runs(tmp_path, [0.0]))


def test_an_unknown_metric_is_reported_with_the_known_ones(tmp_path: Path):
    with pytest.raises(CompareError, match=rf"has no metric eval/nothing; it has {ACCURACY}, eval/loss"):
        parse_reach("eval/nothing=1", _runs(tmp_path, [0.0]))
