"""What a study runs, chooses, keeps and prints, with a stand-in for the trainer; and one with the trainer itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from relora_mora.config.load import ConfigError
from relora_mora.experiments.study.conduct import CellsFailed, conduct, run_again
from relora_mora.experiments.study.design import (
    LONGEST_NAME,
    Study,
    chosen,
    count,
    first_round,
    read_study,
    second_round,
)
from relora_mora.experiments.study.folder import StudyFolder, cell_configs
from relora_mora.experiments.study.record import final_metric
from relora_mora.experiments.study.runner import POLL_SECONDS, Runner
from relora_mora.supervise.lock import RunLock
from relora_mora.system.run_folder import read_json_lines
from tests.experiments.study.tools import BASE, PROGRAM, RATES, TRAINER, made_study
from tests.tools.grids import rest
from tests.tools.helpers import ROOT
from tests.tools.jobs import lives


def _names(study: Study) -> list[str]:
    return [cell.name for cell in first_round(study)]


def test_a_grid_stands_for_all_combinations_and_seeds():
    study = made_study(seeds=[0, 7])
    cells = first_round(study)
    assert len(cells) == count(study) == 12
    assert cells[1].name == "name=mora,rank=8,lr=0.001,seed=7"
    assert cells[1].overrides(study) == {
        "method.name": '"mora"',
        "method.rank": "8",
        "optim.lr": "0.001",
        "train.seed": "7",
        "data.seed": "7",
    }


def test_settings_of_a_cell_win_over_those_of_the_study():
    study = made_study(settings={"optim.lr": 5.0, "train.steps": 3})
    overrides = first_round(study)[0].overrides(study)
    assert overrides["optim.lr"] == "0.001"
    assert overrides["train.steps"] == "3"


def test_names_suit_folders_and_distinguish_settings():
    grid = [{"method.operators": [[1], [1, 2]]}, {"optim.schedule": "wsd", "eval.every_steps": 3, "log.every_steps": 4}]
    assert _names(made_study(grid=grid)) == [
        "operators=1,seed=0",
        "operators=1_2,seed=0",
        "schedule=wsd,eval.every_steps=3,log.every_steps=4,seed=0",
    ]


def test_names_that_are_too_long_or_alike_have_a_digest():
    plain, dotted, long = _names(made_study(grid=[{"tokenizer.path": ["a/b", "a/_b", "x" * 300]}]))
    assert len({plain, dotted, long}) == 3
    assert re.fullmatch(r"path=a_b,[0-9a-f]{8},seed=0", plain)
    assert re.fullmatch(r"path=a_b,[0-9a-f]{8},seed=0", dotted)
    assert re.fullmatch(r"path=x+,[0-9a-f]{8},seed=0", long)
    assert len(long) <= LONGEST_NAME


def test_the_best_of_a_grid_is_run_with_the_other_seeds():
    study = made_study(seeds=[0, 1, 2], choose={"over": ["optim.lr"], "lowest": "eval/loss"})
    cells = first_round(study)
    assert len(cells) == 6
    assert count(study) == 6 + 2 * 2
    losses = dict(zip(cells, [3.0, 2.0, 4.0, 1.0, 1.0, 5.0], strict=True))
    assert [cell.name for cell in chosen(study, losses)] == [cells[1].name, cells[3].name]
    more = second_round(study, losses)
    assert [(dict(cell.values)["optim.lr"], cell.seed) for cell in more] == [
        ("0.003", 1),
        ("0.003", 2),
        ("0.001", 1),
        ("0.001", 2),
    ]
    highest = made_study(seeds=[0, 1], choose={"over": ["optim.lr"], "highest": "eval/exact_match"})
    assert [cell.name for cell in chosen(highest, losses)] == [cells[2].name, cells[5].name]


def test_the_order_in_which_an_entry_names_its_settings_does_not_matter_to_the_choice():
    grid = [
        {"method.name": "mora", "method.rank": 8, "optim.lr": 1e-3},
        {"optim.lr": 3e-3, "method.rank": 8, "method.name": "mora"},
    ]
    study = made_study(grid=grid, seeds=[0, 1], choose={"over": ["optim.lr"], "lowest": "eval/loss"})
    first, second = first_round(study)
    assert chosen(study, {first: 2.0, second: 1.0}) == [second]
    assert count(study) == 3


def test_a_failed_run_is_not_chosen():
    study = made_study(seeds=[0, 1], choose={"over": ["optim.lr"], "lowest": "eval/loss"})
    cells = first_round(study)
    assert [cell.name for cell in chosen(study, {cells[2]: 9.0})] == [cells[2].name]


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"base": BASE}, "grid: Field required"),
        ({"base": BASE, "grid": []}, "grid: "),
        ({"base": BASE, "grid": [{"optim.lr": 1e-3}], "sedes": [1]}, "sedes: unknown; known here: command, base,"),
        ([BASE], "it holds a list, expected "),
        ('grid: {data.train: "https://user:swordfish@host/a"}: x', "not YAML: "),
        ("", "base"),
        ({"base": BASE, "grid": {"optim.lr": 1e-3}}, "grid: expected a list of mappings"),
        ({"base": BASE, "grid": [{"optim.lr": 1e-3}], "seeds": [0, 0]}, "seeds: [0, 0] has a duplicate"),
        ({"base": BASE, "grid": [{"method.operators": [1, 2]}]}, "a value of method.operators is itself a list"),
        ({"base": BASE, "grid": [{"train.seed": [1, 2]}]}, "train.seed: set by the study itself"),
        ({"base": BASE, "grid": [{"optim.lr": 1e-3}], "choose": {"over": ["optim.lr"]}}, "give `lowest` or `highest`"),
        (
            {"base": BASE, "grid": [{"optim.lr": [1.0]}], "choose": {"over": ["optim.lr"], "lowest": "eval/los"}},
            "eval/los: expected eval/NAME or eval/SET/NAME with a name of loss, perplexity,",
        ),
        ({"base": BASE, "grid": [{"optim.lr": []}]}, "grid: optim.lr has an empty list"),
        ({"base": BASE, "grid": [{"data.validation.my-set": "x"}]}, "data.validation.my-set: names cannot contain '-'"),
        (
            {"base": BASE, "grid": [{"optim.lr": 1e-3}], "choose": {"over": ["method.rank"], "lowest": "eval/loss"}},
            "no entry of the grid has method.rank",
        ),
    ],
)
def test_bad_studies_are_reported_before_anything_runs(tmp_path: Path, tree: Any, said: str):
    path = tmp_path / "study.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.dump(tree), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"study\.yaml") as error:
        read_study(path)
    assert said in str(error.value)
    assert "swordfish" not in str(error.value)


def test_the_same_run_twice_is_refused():
    with pytest.raises(ValueError, match=r"names the same run twice: lr=0\.001,seed=0"):
        first_round(made_study(grid=[{"optim.lr": [1e-3, 1e-3]}]))


@pytest.mark.parametrize(
    "grid",
    [
        [{"method.name": "full", "optim.lr": 1e-3}, {"optim.lr": 1e-3, "method.name": "full"}],
        [{"method.name": "full", "method.rank": [8, 16]}],
        [{"method.name": "mora", "method.operators": [[1], [1, 2]]}],
        [
            {
                "method.name": "remora",
                "method.operators": [[1, 2]],
                "method.reset_ratio": [0.5, 0.9],
                "train.steps": 4000,
            }
        ],
        [{"method.name": "mora", "method.square_size": 8, "method.rank": [8, 16]}],
        [{"method.name": "full", "optim.schedule": "constant", "optim.min_ratio": [0.1, 0.2]}],
    ],
)
def test_the_same_run_under_another_name_is_refused(tmp_path: Path, grid: list[dict[str, Any]]):
    study = made_study(grid=grid)
    with pytest.raises(ConfigError, match=r"differ only in settings that have no effect; leave"):
        cell_configs(study, first_round(study), StudyFolder(tmp_path))


def test_runs_without_common_held_out_text_are_reported_first(tmp_path: Path):
    sets = [{"short": "a.json"}, {"short": "b.json", "long": "a.json"}, {"long": "a.json"}]
    for given, fault in ((sets[:2], None), (sets, "data.validation: the runs have no set in common")):
        study = made_study(grid=[{"data.validation": given}])
        with contextlib.nullcontext() if fault is None else pytest.raises(ConfigError, match=fault):
            cell_configs(study, first_round(study), StudyFolder(tmp_path))


def test_all_runs_of_a_study_read_the_same_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commits = iter("ab")
    monkeypatch.setattr("relora_mora.data.bytes.hub.ask_for_commit", lambda *_: next(commits) * 40)
    study = made_study(
        grid=[{"method.name": "mora"}], settings={"data.validation": "some/set", "optim.lr": 2.5e-3}, seeds=[0, 1]
    )
    folder = StudyFolder(tmp_path)
    assert conduct(study, folder, PROGRAM, 1) == 2
    noted = {record["given"]["data"]["commits"]["some/set@main"] for record in read_json_lines(folder.records)}
    assert noted == {"a" * 40}
    name = first_round(study)[0].name
    again = StudyFolder(tmp_path / "again" / name)
    run_again(study, folder, name, PROGRAM)
    assert again.commits() == {"some/set@main": "a" * 40}
    (tmp_path / "commits.json").unlink()
    assert conduct(study, folder, PROGRAM, 1) == 2, "the records hold it, too"


def test_faults_of_all_runs_are_reported_together(tmp_path: Path):
    study = made_study(grid=[{"method.rank": [8, -1], "optim.lr": [1e-3, 100.0]}])
    with pytest.raises(ConfigError) as error:
        conduct(study, StudyFolder(tmp_path), PROGRAM, 1)
    assert len(error.value.faults) == 2
    assert "method.rank" in error.value.faults[1]
    assert "(in rank=-1,lr=0.001,seed=0)" in error.value.faults[1]
    assert not any(tmp_path.iterdir())


SETS = {"web": "a.txt", "pairs": {"source": "b.jsonl", "records": {"kind": "prompt"}}}


@pytest.mark.parametrize(
    ("metric", "settings", "said"),
    [
        ("eval/books/loss", {}, "data.validation names no sets"),
        ("eval//loss", {}, "data.validation names no sets"),
        ("eval/books/loss", {"data.validation": SETS}, "data.validation names web, pairs"),
        ("eval/exact_match", {}, "no answers are generated; set eval.generate"),
        ("eval/web/exact_match", {"data.validation": SETS, "eval.generate": 5}, "no answers are generated"),
        ("eval/bits_per_byte", {"data.validation": SETS}, "only plain text has this metric"),
    ],
)
def test_a_metric_that_no_run_will_have_is_reported_first(
    tmp_path: Path, metric: str, settings: dict[str, Any], said: str
):
    study = made_study(settings=settings, choose={"over": ["optim.lr"], "lowest": metric})
    with pytest.raises(ConfigError) as error:
        conduct(study, StudyFolder(tmp_path), PROGRAM, 1)
    assert [fault.startswith(f"choose: {metric}: {said}") for fault in error.value.faults] == [True]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("metric", ["eval/loss", "eval/web/loss", "eval/web/bits_per_byte", "eval/pairs/exact_match"])
def test_a_metric_that_the_runs_will_have_is_accepted(tmp_path: Path, metric: str):
    settings = {"data.validation": SETS, "eval.generate": 5}
    study = made_study(settings=settings, choose={"over": ["optim.lr"], "lowest": metric})
    assert len(cell_configs(study, first_round(study), StudyFolder(tmp_path))) == 6


def test_runs_what_is_missing_and_keeps_a_record_of_all(tmp_path: Path):
    study = made_study(seeds=[0, 1], choose={"over": ["optim.lr"], "lowest": "eval/loss"}, threads=3)
    folder = StudyFolder(tmp_path)
    assert conduct(study, folder, PROGRAM, 4) == 8
    records = read_json_lines(folder.records)
    best = records[-1]
    assert best["name"] == "name=mora,rank=16,lr=0.003,seed=1"
    assert best["config"]["optim"]["lr"] == 0.003
    assert best["config"]["method"]["rank"] == 16
    start = {"commit": "abc", "host": "here", "threads": 2, "omp_num_threads": "3"}
    assert best["start"] == {**start, "step": 0}
    steps = best["config"]["train"]["steps"]
    assert best["metrics"] == [{"step": steps // 2, "train/loss": 5.0}, {"step": steps, "eval/loss": 0.01}]
    assert "some words of the run" in folder.log(first_round(study)[0]).read_text(encoding="utf-8")

    assert best["given"]["optim"]["lr"] == 0.003

    starts = {path: path.read_bytes() for path in tmp_path.rglob("starts.jsonl")}
    assert len(starts) == 8
    assert conduct(study, folder, PROGRAM, 1) == 8
    assert {path: path.read_bytes() for path in tmp_path.rglob("starts.jsonl")} == starts


def test_an_unfinished_run_counts_by_its_steps(tmp_path: Path):
    folder = StudyFolder(tmp_path)
    [cell] = first_round(made_study(grid=[{"optim.lr": 1e-3}]))
    assert folder.fraction(cell) == 0
    run = folder.run(cell)
    run.path.mkdir(parents=True)
    run.config.write_text("train: {steps: 40}\n", encoding="utf-8")
    run.metrics.write_text('{"step": 10}\n{"step": 30}\n', encoding="utf-8")
    assert folder.fraction(cell) == 0.75
    for cut in ("", '{"code": 0'):
        run.ends.write_text(cut, encoding="utf-8")
        assert folder.fraction(cell) == 0.75
    run.ends.write_text('{"code": 75}\n{"code": 0}\n', encoding="utf-8")
    assert folder.fraction(cell) == 1


def test_the_bar_never_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An interrupted run counts while it waits for its turn."""
    study = made_study(grid=[{"method.name": "mora", "optim.lr": [1e-3, 3e-3]}])
    folder = StudyFolder(tmp_path)
    cut = folder.run(first_round(study)[1])
    cut.path.mkdir(parents=True)
    cut.config.write_text("train: {steps: 1000}\n", encoding="utf-8")
    cut.metrics.write_text('{"step": 500}\n', encoding="utf-8")
    seen = []
    show = Runner._show

    def noted(self: Runner, waiting: list[Any], running: list[Any]) -> None:
        show(self, waiting, running)
        seen.append(self.bar.n)

    monkeypatch.setattr(Runner, "_show", noted)
    conduct(study, folder, PROGRAM, 1)
    assert seen == sorted(seen)
    assert seen[0] >= 0.5
    assert seen[-1] == pytest.approx(2)


def test_a_run_whose_last_evaluation_is_not_finite_is_not_chosen(tmp_path: Path):
    folder = StudyFolder(tmp_path)
    [cell] = first_round(made_study(grid=[{"optim.lr": 1e-3}]))
    run = folder.run(cell)
    run.path.mkdir(parents=True)
    run.ends.write_text('{"code": 0}\n', encoding="utf-8")
    run.config.write_text("train: {steps: 2}\n", encoding="utf-8")
    run.metrics.write_text('{"step": 1, "eval/loss": 2.0}\n{"step": 2, "eval/loss": null}\n', encoding="utf-8")
    assert final_metric(cell, folder, "eval/loss") is None


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_that_lost_its_last_evaluation_is_not_chosen_by_an_earlier_one(tmp_path: Path, gone: bool):
    """A full disk costs lines of metrics, but not the run."""
    study = made_study(grid=[{"method.name": "mora", "optim.lr": 3e-3}])
    folder = StudyFolder(tmp_path)
    conduct(study, folder, PROGRAM, 1)
    [cell] = first_round(study)
    metrics = folder.run(cell).metrics
    assert final_metric(cell, folder, "eval/loss") == 0.0
    metrics.write_text('{"step": 500, "eval/loss": 2.0}\n{"step": 1000, "train/loss": 1.0}\n', encoding="utf-8")
    if gone:
        folder.records.unlink()
        conduct(study, folder, PROGRAM, 1)
        shutil.rmtree(folder.run(cell).path)
    with pytest.raises(
        ValueError, match=r"eval/loss in .*metrics.jsonl is from step 500, but the run has 1000 steps .* is lost; "
    ):
        final_metric(cell, folder, "eval/loss")


def test_a_run_that_fails_is_named_when_the_others_are_done(tmp_path: Path):
    study = made_study(grid=[{"method.name": "mora", "optim.lr": [1.0, 3e-3]}])
    folder = StudyFolder(tmp_path)
    with pytest.raises(CellsFailed, match=r"lr=1.0,seed=0 did not finish; the end of .*\n.*\n  it diverged"):
        conduct(study, folder, PROGRAM, 1)
    assert [record["name"] for record in read_json_lines(folder.records)] == ["name=mora,lr=0.003,seed=0"]


def _written(tmp_path: Path, study: dict[str, Any]) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.dump({"base": BASE} | study), encoding="utf-8")
    return path


CONDUCT = """
import sys
from pathlib import Path
from relora_mora.experiments.study.conduct import conduct
from relora_mora.experiments.study.design import read_study
from relora_mora.experiments.study.folder import StudyFolder
from relora_mora.experiments.study.runner import Stopped
try:
    print(conduct(read_study(sys.argv[1]), StudyFolder(Path(sys.argv[2])), [sys.argv[3]], 2))
except Stopped:
    print("stopped")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, *rest((signal.SIGINT,))])
def test_a_stop_is_passed_on_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals):
    study = _written(tmp_path, {"grid": [{"method.name": "mora", "optim.lr": [2.0, 3e-3, 2.5e-3]}]})
    folder = StudyFolder(tmp_path / "out")
    command = [sys.executable, "-c", CONDUCT, str(study), str(folder.path), str(TRAINER)]
    waiting, *others = first_round(read_study(study))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while not ((folder.run(waiting).path / "waits").exists() and all(map(folder.is_done, others))):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, number)
        said, _ = process.communicate(timeout=120)
    assert said == "stopped\n"
    assert not folder.is_done(waiting)
    assert [record["name"] for record in read_json_lines(folder.records)] == [cell.name for cell in others]
    assert conduct(read_study(study), folder, PROGRAM, 1) == 3
    assert len(folder.run(waiting).starts.read_text(encoding="utf-8").splitlines()) == 2
    assert read_json_lines(folder.records)[0]["start"]["step"] == 0, "the axis of time begins where the run began"


def test_studies_that_begin_at_once_share_out_the_runs(tmp_path: Path):
    study = _written(tmp_path, {"grid": [{"method.name": "mora", "method.rank": [8, 16], "optim.lr": RATES}]})
    folder = StudyFolder(tmp_path / "out")
    command = [sys.executable, "-c", CONDUCT, str(study), str(folder.path), str(TRAINER)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    assert [process.communicate(timeout=240)[0] for process in started] == ["6\n"] * 2
    cells = first_round(read_study(study))
    assert [folder.log(cell).read_text(encoding="utf-8") for cell in cells] == ["some words of the run\n"] * 6
    assert [record["name"] for record in read_json_lines(folder.records)] == [cell.name for cell in cells]


@contextlib.contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[None]:
    """Ends with the block, so that a failing test does not wait for it."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.parametrize(("held", "ends"), [("claim", True), ("run", False), *rest(("claim", False))])
def test_cells_that_another_study_runs_are_left_to_it(tmp_path: Path, held: str, ends: bool):
    """Unless that study ends before the run. A run may outlive its study while it saves."""
    study = _written(tmp_path, {"grid": [{"method.name": "mora", "optim.lr": [2.5e-3, 3e-3]}]})
    folder = StudyFolder(tmp_path / "out")
    claimed, other = first_round(read_study(study))
    claim = RunLock(folder.claim(claimed) if held == "claim" else folder.run(claimed).path)
    claim.acquire()
    command = [sys.executable, "-c", CONDUCT, str(study), str(folder.path), str(TRAINER)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process, ending(process):
        while not folder.is_done(other):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(3 * POLL_SECONDS)
        assert process.poll() is None
        if ends:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            run = [sys.executable, str(TRAINER), str(folder.settings(claimed))]
            subprocess.run(run, check=True, cwd=ROOT, env=environment)
        claim.release()
        said, _ = process.communicate(timeout=120)
    assert said == "2\n"
    assert folder.log(claimed).exists() == (not ends), "whether the study has started it"
    assert {record["name"] for record in read_json_lines(folder.records)} == {claimed.name, other.name}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_the_runs_of_a_study_that_is_killed_end_with_it(tmp_path: Path):
    study = _written(tmp_path, {"grid": [{"method.name": "mora", "optim.lr": [2.0]}]})
    folder = StudyFolder(tmp_path / "out")
    [waiting] = first_round(read_study(study))
    run = folder.run(waiting).path
    with subprocess.Popen(
        [sys.executable, "-c", CONDUCT, str(study), str(folder.path), str(TRAINER)], cwd=ROOT
    ) as process:
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


def test_a_repeated_run_is_compared_number_by_number(tmp_path: Path):
    study = made_study(grid=[{"method.name": ["mora", "lora"], "optim.lr": 3e-3}])
    folder = StudyFolder(tmp_path)
    conduct(study, folder, PROGRAM, 2)
    assert run_again(study, folder, "name=mora,lr=0.003,seed=0", PROGRAM) == (2, [])
    numbers, different = run_again(study, folder, "name=lora,lr=0.003,seed=0", PROGRAM)
    assert numbers == 2
    assert [line.partition(":")[0] for line in different] == ["eval/loss at step 1000"]
    with pytest.raises(ValueError, match="--again: no finished run is called nothing; finished runs: name=mora"):
        run_again(study, folder, "nothing", PROGRAM)


def test_an_interrupted_repetition_continues(tmp_path: Path):
    study = made_study(grid=[{"method.name": "mora", "optim.lr": 3e-3}])
    [cell] = first_round(study)
    folder = StudyFolder(tmp_path)
    conduct(study, folder, PROGRAM, 1)
    run_again(study, folder, cell.name, PROGRAM)
    again = StudyFolder(tmp_path / "again" / cell.name).run(cell)
    (again.path / "mark").touch()
    again.ends.unlink()
    assert run_again(study, folder, cell.name, PROGRAM) == (2, [])
    assert (again.path / "mark").exists()
    assert run_again(study, folder, cell.name, PROGRAM) == (2, [])
    assert not (again.path / "mark").exists()


def test_a_study_whose_runs_could_not_go_on_is_refused(tmp_path: Path):
    study = made_study(grid=[{"method.name": "mora"}], settings={"train.resume": "never"})
    with pytest.raises(ConfigError, match=r"train\.resume: never, but a study resumes its interrupted runs"):
        conduct(study, StudyFolder(tmp_path), PROGRAM, 1)


def test_every_study_can_be_run(tmp_path: Path):
    paths = sorted((ROOT / "configs/study").glob("*.yaml"))
    assert paths
    for path in paths:
        study = read_study(path)
        folder = StudyFolder(tmp_path / path.stem)
        configs = cell_configs(study, first_round(study), folder)
        for _ in range(2):
            folder.begin(configs, study.threads)
        assert len({json.dumps(config.model_dump()) for config in configs.values()}) == len(configs)
