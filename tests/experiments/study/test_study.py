"""What a study runs, keeps and prints, with a stand-in for the trainer, and how it stops and continues."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from relora_mora.experiments.compare.runs import Run
from relora_mora.experiments.study.conduct import CellsFailed, conduct, known_cells
from relora_mora.experiments.study.design import first_round, read_study
from relora_mora.experiments.study.folder import StudyFolder, cell_configs, final_metric
from relora_mora.system.run_folder import read_json_lines
from tests.experiments.study.tools import BASE, PROGRAM, TRAINER, made_study
from tests.tools.each import each
from tests.tools.grids import rest
from tests.tools.helpers import ROOT
from tests.tools.jobs import lives


@pytest.mark.more
def test_runs_what_is_missing(tmp_path: Path):
    study = made_study(seeds=[0, 1], choose={"over": ["optim.lr"], "lowest": "eval/loss"}, threads=3)
    folder = StudyFolder(tmp_path)
    assert conduct(study, folder, PROGRAM, 4) == 8
    cells = known_cells(study, folder)
    assert not folder.missing(cells)
    best = cells[-1]
    assert best.name == "name=mora,rank=16,lr=0.003,seed=1"
    [start] = read_json_lines(folder.run(best).starts)
    assert start["omp_num_threads"] == "3"
    assert read_json_lines(folder.run(best).metrics)[-1]["eval/loss"] == 0.01
    assert json.loads(folder.settings(best).read_text(encoding="utf-8"))["optim"]["lr"] == 0.003
    assert "some words of the run" in folder.log(cells[0]).read_text(encoding="utf-8")

    starts = {path: path.read_bytes() for path in tmp_path.rglob("starts.jsonl")}
    assert len(starts) == 8
    assert conduct(study, folder, PROGRAM, 1) == 8
    assert {path: path.read_bytes() for path in tmp_path.rglob("starts.jsonl")} == starts


@each("ends", ["", '{"code": 0', '{"code": 0}\n{"code": 75}\n'])
def test_a_run_whose_end_is_cut_off_or_not_the_last_is_not_finished(tmp_path: Path, ends: str):
    folder = StudyFolder(tmp_path)
    study = made_study(grid=[{"method.name": "mora", "optim.lr": 3e-3}])
    [cell] = first_round(study)
    folder.begin(cell_configs(study, [cell], folder))
    run = folder.run(cell)
    run.path.mkdir(parents=True)
    run.ends.write_text('{"code": 75}\n{"code": 0}\n', encoding="utf-8")
    assert folder.is_done(cell)
    run.ends.write_text(ends, encoding="utf-8")
    assert not folder.is_done(cell)


def test_a_run_is_chosen_by_its_last_step_and_not_by_an_earlier_one():
    """A full disk costs lines of metrics, but not the run."""
    lines = [{"step": 1, "eval/loss": 1.0}, {"step": 2, "eval/loss": None}, {"step": 2, "eval/loss": 2.0}]
    runs = [Run(Path("a"), {"train.steps": 2}, [*lines[:1], *last], []) for last in (lines[1:2], lines[2:], [])]
    assert [final_metric(run, "eval/loss") for run in runs[:2]] == [None, 2.0]
    with pytest.raises(ValueError, match="a has no eval/loss of its last step, 2; remove"):
        final_metric(runs[2], "eval/loss")


@pytest.mark.more
def test_a_run_that_fails_is_named_when_the_others_are_done(tmp_path: Path):
    study = made_study(grid=[{"method.name": "mora", "optim.lr": [1.0, 3e-3]}])
    folder = StudyFolder(tmp_path)
    with pytest.raises(CellsFailed, match=r"lr=1.0,seed=0 did not finish; the end of .*\n.*\n  it diverged"):
        conduct(study, folder, PROGRAM, 1)
    assert [cell.name for cell in folder.missing(first_round(study))] == ["name=mora,lr=1.0,seed=0"]


def _conducting(tmp_path: Path, rates: list[float], **pipes: Any) -> tuple[Path, StudyFolder, Any]:
    """A study's file, its folder, and a process that conducts it."""
    study = tmp_path / "study.yaml"
    study.write_text(yaml.dump({"base": BASE, "grid": [{"method.name": "mora", "optim.lr": rates}]}), encoding="utf-8")
    folder = StudyFolder(tmp_path / "out")
    command = [sys.executable, "-c", CONDUCT, str(study), str(folder.path), str(TRAINER)]
    return study, folder, subprocess.Popen(command, cwd=ROOT, **pipes)


CONDUCT = """
import sys
from pathlib import Path
from relora_mora.experiments.study.conduct import Stopped, conduct
from relora_mora.experiments.study.design import read_study
from relora_mora.experiments.study.folder import StudyFolder
try:
    print(conduct(read_study(sys.argv[1]), StudyFolder(Path(sys.argv[2])), [sys.argv[3]], 2))
except Stopped:
    print("stopped")
"""


@pytest.mark.more
@pytest.mark.parametrize("number", [signal.SIGTERM, *rest((signal.SIGINT,))])
def test_a_stop_is_passed_on_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals):
    study, folder, process = _conducting(tmp_path, [2.0, 3e-3, 2.5e-3], stdout=subprocess.PIPE, text=True)
    waiting, *others = first_round(read_study(study))
    with process:
        while not ((folder.run(waiting).path / "waits").exists() and not folder.missing(others)):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, number)
        said, _ = process.communicate(timeout=120)
    assert said == "stopped\n"
    assert folder.missing([waiting, *others]) == [waiting]
    assert conduct(read_study(study), folder, PROGRAM, 1) == 3
    assert len(folder.run(waiting).starts.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.more
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_the_runs_of_a_study_that_is_killed_end_with_it(tmp_path: Path):
    study, folder, process = _conducting(tmp_path, [2.0])
    run = folder.run(first_round(read_study(study))[0]).path
    with process:
        while not (run / "waits").exists():
            assert process.poll() is None
            time.sleep(0.05)
        trainer = psutil.Process(int((run / "pid").read_text()))
        assert lives(trainer)
        process.kill()
    deadline = time.monotonic() + 120
    while lives(trainer) and time.monotonic() < deadline:
        time.sleep(0.05)
    if lives(trainer):
        trainer.kill()
        pytest.fail("the run goes on without its study")
    assert conduct(read_study(study), folder, PROGRAM, 1) == 1
