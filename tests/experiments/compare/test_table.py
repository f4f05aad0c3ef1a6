"""The numbers of a row, and the table that shows them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from relora_mora.experiments.compare import table
from relora_mora.experiments.compare.groups import Group, group_runs
from relora_mora.experiments.compare.runs import CompareError, read_run
from relora_mora.system.run_folder import RunFolder
from tests.experiments.compare.folders import made_run, write_run
from tests.tools.each import each

FULL: dict[str, Any] = {"method": {"name": "full"}}


def _groups(folder: Path, *runs: dict[str, Any]) -> list[Group]:
    return group_runs(made_run(folder / f"run{index}", **given) for index, given in enumerate(runs))


def markdown(groups: list[Group], reference: int = 0) -> str:
    return table.markdown(groups, groups[reference])


def _cells(table: str) -> list[dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def test_a_row_has_the_last_evaluation_and_what_it_cost(tmp_path: Path) -> None:
    groups = _groups(tmp_path, {**FULL, "losses": [9.0, 4.0, 3.0, 2.0, 1.5]}, {"step_seconds": 4.0})
    full, remora = _cells(markdown(groups))
    assert groups[1].perplexities("") == [math.e]
    assert full["ratio"] == "1.000"
    assert remora == {
        "method": "ReMoRA (1, 2)",
        "trainable": "1.23M",
        "adapters": "54.3k",
        "tokens": "5.12k",
        "loss": "1.0000",
        "perplexity": "2.72",
        "ratio": "0.607",
        "tokens/s": "32",
        "peak memory, GiB": "1.40",
    }


def test_seeds_are_a_mean_with_its_spread(tmp_path: Path) -> None:
    seeds = [
        {"losses": [9.0, 4.0, 3.0, 2.0, loss], "train": {"seed": seed}} for seed, loss in enumerate((1.0, 2.0, 1.2))
    ]
    [cells] = _cells(markdown(_groups(tmp_path, *seeds)))
    assert (cells["seeds"], cells["loss"], cells["tokens/s"]) == ("3", "1.4000 (1.0000–2.0000)", "64")
    found = [(math.exp(1) + math.exp(2) + math.exp(1.2)) / 3, math.exp(1), math.exp(2)]
    assert cells["perplexity"] == "{:.2f} ({:.2f}–{:.2f})".format(*found), "not exp of the mean"


def test_sets_that_all_runs_share_have_their_own_columns(tmp_path: Path) -> None:
    groups = _groups(tmp_path, {"sets": ["web", "books"], **FULL}, {"sets": ["books", "code"]})
    cells = _cells(markdown(groups))
    assert [row["loss (books)"] for row in cells] == ["2.0000", "1.0000"]
    assert not {"loss (web)", "loss (code)"} & cells[0].keys()


def test_perplexities_are_compared_with_another_row(tmp_path: Path) -> None:
    groups = _groups(tmp_path, {**FULL, "losses": [9.0, 4.0, 3.0, 2.0, 2.0]}, {})
    text = markdown(groups, 1)
    assert [row["ratio"] for row in _cells(text)] == ["2.718", "1.000"]
    assert "to ReMoRA (1, 2)" in text


def test_an_interrupted_run_is_marked(tmp_path: Path) -> None:
    cut = {"losses": [9.0, 4.0, 3.5], "train": {"seed": 1}}
    groups = _groups(tmp_path, FULL, {}, cut)
    text = markdown(groups)
    assert groups[1].last("") == [(20, 3.0), (20, 3.5)], "seeds are compared at a common step"
    assert [cells["tokens"] for cells in _cells(text)] == ["5.12k", "2.56k*"]
    assert "\\* ReMoRA (1, 2): unfinished, step 20 of 40." in text
    assert "unequal numbers of tokens" in text


def test_the_scored_text_decides_and_not_its_name(tmp_path: Path) -> None:
    elsewhere: dict[str, Any] = {"data": {"validation": "other.jsonl"}, "digest": "a text"}
    for digest, said in (("a text", False), ("another", True)):
        text = markdown(_groups(tmp_path / digest, {**FULL, "digest": digest}, elsewhere))
        assert ("scored on different tokens" in text, "comparable" in text) == (said, said)


def test_different_content_under_one_name_is_reported_across_a_sweep(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{rate}", [9.0, 4.0], optim={"lr": rate}) for rate in (1e-3, 2e-3, 3e-3)]
    for run, digest in zip(runs, ("a", "b", "b"), strict=True):
        starts = RunFolder(run).starts
        noted = {"began_with": {"data.train": digest, "tokenizer.path": "same"}}
        starts.write_text(json.dumps(json.loads(starts.read_text()) | noted) + "\n")
    note = 'The runs began with different content of data.train="a": they are not comparable.'
    assert note in markdown(group_runs(map(read_run, runs)))
    assert note not in markdown(group_runs(map(read_run, runs[1:])))


@each("other", [{"losses": [math.nan] * 5}, {"sets": ["web"]}])
def test_runs_without_losses_in_common_are_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(CompareError, match="no validation set in common"):
        markdown(_groups(tmp_path, FULL, other))
