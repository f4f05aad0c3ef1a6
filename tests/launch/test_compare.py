"""relora-mora compare: the table on stdout, the files, and bad input in one message."""

import importlib.util
import math
import re
import subprocess
from pathlib import Path

import pytest

from tests.experiments.compare.folders import write_run
from tests.tools.commands import COMPARE, call, left_in, refused
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more

LOSSES = [9.0, 4.0, 3.0, 2.0, 1.0]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    full = write_run(tmp_path / "full", LOSSES, method={"name": "full"})
    return [full, write_run(tmp_path / "remora", LOSSES)]


def test_the_table_is_printed_and_written_with_the_figures(runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'relora_mora[plot]'")
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)
    (out / "compare.md").write_text("what is there is replaced")
    answer = call(COMPARE, *runs, f"--out={out}")
    assert answer.code == 0
    assert answer.err == ""
    assert (out / "compare.md").read_text() == answer.out
    assert "| Full rank |" in answer.out
    assert "| ReMoRA (1, 2) |" in answer.out
    assert left_in(out) == ["compare.md", "loss_by_tokens.png", "perplexity.png"]


def test_only_the_best_of_rows_that_differ_in_one_setting_is_shown(tmp_path: Path) -> None:
    given = [("full", 1e-3, 0, 0.2), ("full", 2e-3, 0, 0.1), ("mora", 1e-3, 0, 0.0), ("mora", 2e-3, 0, 0.3)]
    given += [("mora", 2e-3, 1, 0.3)]
    runs = [
        write_run(
            tmp_path / f"{name}{lr}{seed}",
            [loss + more for loss in LOSSES],
            optim={"lr": lr},
            method={"name": name},
            train={"seed": seed},
        )
        for name, lr, seed, more in given
    ]
    answer = call(COMPARE, *runs, "--best=optim.lr")
    assert answer.code == 0 and "| Full rank | 1 |" in answer.out, "the lower loss, as each has one seed"
    assert "| MoRA | 2 |" in answer.out and answer.out.count("| MoRA |") == 1, "more seeds, whatever the loss"
    assert f"{math.exp(LOSSES[-1] + 0.1):.2f}" in answer.out
    assert f"{math.exp(LOSSES[-1] + 0.3):.2f}" in answer.out
    refused(call(COMPARE, *runs, "--best=lr"), "--best: no run has a setting lr")
    # a run that diverged or has not ended is not the best
    losses = [[9.0, 4.0, 3.5, 3.4, 3.3], [9.0, 4.0, 3.0], [9.0, 4.0, 3.0, 2.9, math.nan]]
    runs = [write_run(tmp_path / f"run{lr}", each, optim={"lr": lr / 1000}) for lr, each in enumerate(losses, start=1)]
    assert f"{math.exp(3.3):.2f}" in call(COMPARE, *runs[::-1], "--best=optim.lr").out


def test_the_tables_in_the_documents_match_the_kept_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    place = f"STUDIES={tmp_path}"
    subprocess.run(["make", "unpacked", place], check=True)
    made = subprocess.run(["make", "-n", "study", place], capture_output=True, text=True, check=True).stdout
    kept = {path.parent for path in (ROOT / "docs/studies").glob("*/compare.md")}
    for line in filter(re.compile("[^ ]+/relora-mora compare").match, made.splitlines()):
        echo = "printf '%s\\n' " + line.partition(COMPARE)[2]
        *words, out = subprocess.run(echo, shell=True, capture_output=True, text=True, check=True).stdout.splitlines()
        folder = Path(out.removeprefix("--out="))
        assert call(COMPARE, *words).out == (folder / "compare.md").read_text(), f"{folder}: make study"
        kept.remove(ROOT / folder)
    assert not kept


def test_what_is_not_a_run_is_left_out_by_name(runs: list[Path], tmp_path: Path) -> None:
    """A pattern such as runs/* may match exports, and runs that have only begun."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").write_text("{}")
    begun = write_run(tmp_path / "begun", LOSSES)
    (begun / "metrics.jsonl").unlink()
    (tmp_path / "log.txt").write_text("some words\n")
    others = (tmp_path / "export", begun, tmp_path / "log.txt")
    answer = call(COMPARE, others[0], *runs, *others[1:])
    assert answer.code == 0
    assert answer.out == call(COMPARE, *runs).out
    for path, line in zip(others, answer.err.splitlines(), strict=True):
        assert line.startswith(f"left out: {path}")


def test_bad_input_gives_one_message(runs: list[Path], tmp_path: Path) -> None:
    refused(call(COMPARE), "no runs given")
    refused(call(COMPARE, tmp_path), f"{tmp_path}: not a run folder")
    refused(call(COMPARE, runs[0], tmp_path / "none"), "none: not found")
    refused(call(COMPARE, runs[0], f"--against={runs[1]}"), "matches none of the runs")
    other = write_run(tmp_path / "other", LOSSES, sets=["web"])
    refused(call(COMPARE, runs[0], other), "no validation set in common")
    (tmp_path / "file").write_text("")
    refused(call(COMPARE, tmp_path / "file"), "not a run folder")
    refused(call(COMPARE, runs[0], f"--out={tmp_path / 'file'}"), f"{tmp_path / 'file'}: File exists")


def test_without_matplotlib_the_table_is_written(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    answer = call(COMPARE, *runs, f"--out={tmp_path / 'out'}")
    assert answer.code == 0
    assert "pip install 'relora_mora[plot]'" in answer.err
    assert (tmp_path / "out/compare.md").read_text() == answer.out
    assert left_in(tmp_path / "out") == ["compare.md"]
