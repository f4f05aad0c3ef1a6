"""What a study file stands for: its runs, their names, the choice of the best, and faults that are reported first."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora_mora.config.load import ConfigError
from relora_mora.experiments.study.conduct import conduct
from relora_mora.experiments.study.design import (
    LONGEST_NAME,
    count,
    first_round,
    read_study,
    second_round,
)
from relora_mora.experiments.study.folder import StudyFolder, cell_configs
from tests.experiments.study.tools import BASE, PROGRAM, made_study
from tests.tools.each import each
from tests.tools.helpers import ROOT

LOWEST = {"over": ["optim.lr"], "lowest": "eval/loss"}


def test_a_grid_stands_for_all_combinations_and_seeds():
    study = made_study(seeds=[0, 7], settings={"optim.lr": 5.0, "train.steps": 3})
    cells = first_round(study)
    assert len(cells) == count(study) == 12
    assert cells[1].name == "name=mora,rank=8,lr=0.001,seed=7"
    assert cells[1].overrides(study) == {
        "train.steps": "3",
        "method.name": '"mora"',
        "method.rank": "8",
        "optim.lr": "0.001",
        "train.seed": "7",
        "data.seed": "7",
    }, "settings of a cell win over those of the study"


def test_names_suit_folders_and_distinguish_settings():
    grid = [{"method.operators": [[1], [1, 2]]}, {"optim.schedule": "wsd", "eval.every_steps": 3, "log.every_steps": 4}]
    assert [cell.name for cell in first_round(made_study(grid=grid))] == [
        "operators=1,seed=0",
        "operators=1_2,seed=0",
        "schedule=wsd,eval.every_steps=3,log.every_steps=4,seed=0",
    ]
    alike = first_round(made_study(grid=[{"tokenizer.path": ["a/b", "a/_b", "x" * 300]}]))
    assert len({cell.name for cell in alike}) == 3
    for cell, start in zip(alike, ("a_b", "a_b", "x+"), strict=True):
        assert re.fullmatch(rf"path={start},[0-9a-f]{{8}},seed=0", cell.name)
        assert len(cell.name) <= LONGEST_NAME


def test_the_best_of_a_grid_is_run_with_the_other_seeds():
    study = made_study(seeds=[0, 1, 2], choose=LOWEST)
    cells = first_round(study)
    assert len(cells) == 6
    assert count(study) == 6 + 2 * 2
    losses = dict(zip(cells, [3.0, 2.0, 4.0, 1.0, 1.0, 5.0], strict=True))
    more = second_round(study, losses)
    assert [(dict(cell.values)["optim.lr"], cell.seed) for cell in more] == [
        ("0.003", 1),
        ("0.003", 2),
        ("0.001", 1),
        ("0.001", 2),
    ]
    assert [cell.values for cell in second_round(study, {cells[2]: 9.0})] == [cells[2].values] * 2, "others failed"
    highest = made_study(seeds=[0, 1], choose={"over": ["optim.lr"], "highest": "eval/exact_match"})
    assert [cell.values for cell in second_round(highest, losses)] == [cells[2].values, cells[5].values]
    values = {"method.name": "mora", "method.rank": 8, "optim.lr": 1e-3}
    study = made_study(grid=[values, {**dict(reversed(values.items())), "optim.lr": 3e-3}], seeds=[0, 1], choose=LOWEST)
    first, second = first_round(study)
    assert [cell.values for cell in second_round(study, {first: 2.0, second: 1.0})] == [second.values]
    assert count(study) == 3, "the order in which an entry names its settings does not matter"


@each(
    ("tree", "said"),
    [
        ({"base": BASE}, "grid: must be given"),
        ({"base": BASE, "grid": [{"optim.lr": 1e-3}], "sedes": [1]}, "sedes: unknown; did you mean seeds?"),
        ([BASE], "it holds a list, expected "),
        ('grid: {data.train: "https://user:swordfish@host/a"}: x', "not YAML: "),
        ({"base": BASE, "grid": {"optim.lr": 1e-3}}, "input should be a valid list"),
        ({"base": BASE, "grid": [{"train.seed": [1, 2]}]}, "train.seed: set by the study itself"),
        ({"base": BASE, "grid": [{"optim.lr": 1e-3}], "choose": {"over": ["optim.lr"]}}, "give `lowest` or `highest`"),
        ({"base": BASE, "grid": [{"optim.lr": []}]}, "optim.lr: has an empty list"),
        (
            {"base": BASE, "grid": [{"optim.lr": 1e-3}], "choose": {"over": ["method.rank"], "lowest": "eval/loss"}},
            "method.rank: chosen over, but no entry of the grid has it",
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


@each(
    "grid,seeds",
    [
        ([{"method.name": "full", "optim.lr": 1e-3}, {"optim.lr": 1e-3, "method.name": "full"}], [0]),
        ([{"method.name": "full", "method.rank": [8, 16]}], [0]),
        ([{"method.name": "mora", "method.operators": [[1], [1, 2]]}], [0]),
        ([{"method.name": "full"}], [3, 3]),
    ],
)
def test_the_same_run_under_another_name_is_refused(tmp_path: Path, grid: list[dict[str, Any]], seeds: list[int]):
    study = made_study(grid=grid, seeds=seeds)
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
    monkeypatch.setattr("relora_mora.data.named_sets.ask_for_commit", lambda *_: next(commits) * 40)
    study = made_study(
        grid=[{"method.name": "mora"}], settings={"data.validation": "some/set", "optim.lr": 2.5e-3}, seeds=[0, 1]
    )
    folder = StudyFolder(tmp_path)
    assert conduct(study, folder, PROGRAM, 1) == 2
    given = [json.loads(folder.settings(cell).read_text(encoding="utf-8")) for cell in first_round(study)]
    assert [tree["data"]["commits"]["some/set@main"] for tree in given] == ["a" * 40] * 2


def test_faults_of_all_runs_are_reported_together(tmp_path: Path):
    grid = [{"method.rank": [8, -1], "optim.lr": [1e-3, 100.0]}]
    study = made_study(grid=grid)
    with pytest.raises(ConfigError) as error:
        conduct(study, StudyFolder(tmp_path), PROGRAM, 1)
    lr, rank = error.value.faults
    assert lr.startswith("optim.lr")
    assert "method.rank" in rank and "(in rank=-1,lr=0.001,seed=0)" in rank
    assert not any(tmp_path.iterdir())


@each(
    ("metric", "settings", "said"),
    [
        ("eval/web/bits_per_byte", {"data.validation": {"web": "a.txt"}}, None),
        ("eval/books/loss", {}, "not a metric of this run, which has eval/loss, eval/perplexity, eval/bits_per_byte"),
        ("eval/exact_match", {}, "not a metric of this run"),
        ("eval/los", {}, "not a metric of this run"),
    ],
)
def test_a_metric_that_no_run_will_have_is_reported_first(
    tmp_path: Path, metric: str, settings: dict[str, Any], said: str | None
):
    study = made_study(settings=settings, choose={"over": ["optim.lr"], "lowest": metric})
    if said is None:
        assert len(cell_configs(study, first_round(study), StudyFolder(tmp_path))) == 6
        return
    with pytest.raises(ConfigError, match=rf"choose: {metric}: {said}"):
        conduct(study, StudyFolder(tmp_path), PROGRAM, 1)
    assert not any(tmp_path.iterdir())


@pytest.mark.more
def test_every_study_can_be_run(tmp_path: Path):
    paths = sorted((ROOT / "configs/study").glob("*.yaml"))
    assert paths
    for path in paths:
        study = read_study(path)
        folder = StudyFolder(tmp_path / path.stem)
        configs = cell_configs(study, first_round(study), folder)
        for _ in range(2):
            folder.begin(configs)
        assert len({json.dumps(config.model_dump()) for config in configs.values()}) == len(configs)
