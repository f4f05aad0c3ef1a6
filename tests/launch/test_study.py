"""relora-mora study: what it says of bad arguments; `make study-smoke` runs it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from relora_mora.config.load import ConfigError
from relora_mora.experiments.study.conduct import CellsFailed, check_inputs, conduct
from relora_mora.experiments.study.design import Study, first_round
from relora_mora.experiments.study.folder import StudyFolder
from relora_mora.system.run_folder import RunFolder
from tests.experiments.compare.folders import write_run
from tests.experiments.study.tools import BASE, PROGRAM, made_study
from tests.tools.commands import call, refused
from tests.tools.runs import write_inputs

pytestmark = pytest.mark.more

STUDY = "study"


def test_bad_arguments_are_reported_before_anything_runs(tmp_path: Path):
    study, out = tmp_path / "study.yaml", f"--out={tmp_path / 'out'}"
    study.write_text(yaml.dump({"base": "nowhere.yaml", "grid": [{"optim.lr": 1e-3}]}), encoding="utf-8")
    refused(call(STUDY, study, out), "nowhere.yaml", "cannot read it")
    study.write_text("grid: [", encoding="utf-8")
    refused(call(STUDY, study), "study.yaml", "not YAML")
    settings = {"data.train": str(tmp_path / "no.json"), "tokenizer.path": str(tmp_path / "none")}
    grid = [{"method.name": "mora", "method.rank": [8, 1_000_000], "optim.lr": [1e-3, 3e-3]}]
    study.write_text(yaml.dump({"base": BASE, "settings": settings, "grid": grid}), encoding="utf-8")
    result = call(STUDY, study, out)
    refused(result, "no.json", "none", "the adapters have", "(in name=mora,rank=1000000,lr=0.001,seed=0)")
    assert result.err.count("no.json") == 1, "the same for all runs"
    assert not (tmp_path / "out").exists()


def test_missing_inputs_of_the_second_round_are_reported_after_the_first(tmp_path: Path):
    text = write_inputs(tmp_path / "text")
    settings = {f"data.{side}": str(text / side / "*.json.gz") for side in ("train", "validation")}
    choose = {"over": ["optim.lr"], "lowest": "eval/loss"}
    grid = [{"method.name": "mora", "optim.lr": [3e-3, 1e-2]}]
    folder = StudyFolder(tmp_path / "out")
    first, both = (made_study(grid=grid, seeds=seeds, choose=choose, settings=settings) for seeds in ([0], [0, 1]))
    assert conduct(first, folder, PROGRAM, 2) == 2
    shutil.rmtree(text)
    check_inputs(first, folder)
    with pytest.raises(ConfigError, match=r"data\.train: .*text/train.*\(in name=mora,lr=0\.003,seed=1\)"):
        check_inputs(both, folder)


def test_the_table_has_the_other_runs_if_one_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    grid = [{"method.name": "mora", "method.rank": [4, 8]}]
    study.write_text(yaml.dump({"base": BASE, "grid": grid}), encoding="utf-8")

    def failing(plan: Study, folder: StudyFolder, *_: object) -> int:
        for cell, losses in zip(first_round(plan), ([9.0, 4.0, 3.0, 2.0, 1.0], [9.0]), strict=True):
            run = RunFolder(write_run(folder.run(cell).path, losses))
            run.ends.write_text(json.dumps({"code": int(len(losses) == 1)}) + "\n", encoding="utf-8")
        raise CellsFailed("rank=8,seed=0 did not finish")

    monkeypatch.setattr("relora_mora.experiments.study.conduct.check_inputs", lambda *_: None)
    monkeypatch.setattr("relora_mora.experiments.study.conduct.conduct", failing)
    result = call(STUDY, study, f"--out={out}")
    refused(result, "rank=8,seed=0 did not finish")
    assert result.out.count("| ReMoRA ") == 1 and "unfinished" not in result.out
    assert (out / "compare.md").read_text() == result.out
    assert (tmp_path / "out/loss_by_tokens.png").exists()
