"""A study that has changed since its runs began is refused."""

import json
from pathlib import Path

import pytest

from relora_mora.experiments.study.conduct import CellsFailed, conduct
from relora_mora.experiments.study.design import first_round
from relora_mora.experiments.study.folder import StudyFolder, cell_configs
from tests.experiments.study.tools import PROGRAM, made_study

ONE = [{"method.name": "mora", "optim.lr": 3e-3}]
TWO = [{"method.name": "mora", "optim.lr": [3e-3, 1e-2]}]
OTHER = {"optim.clip": 3.0}


def test_a_changed_setting_is_refused_whether_a_run_is_done_or_failed(tmp_path: Path):
    grid = [{"method.name": "mora", "optim.lr": [1.0, 3e-3]}]
    folder = StudyFolder(tmp_path)
    with pytest.raises(CellsFailed):
        conduct(made_study(grid=grid), folder, PROGRAM, 1)
    with pytest.raises(ValueError) as refused:
        conduct(made_study(grid=grid, settings=OTHER), folder, PROGRAM, 1)
    for lr in ("1.0", "0.003"):
        assert f"lr={lr},seed=0 was started with other settings (optim.clip); remove it" in str(refused.value)


def test_cells_may_change_until_a_run_has_found_no_fault_in_their_settings(tmp_path: Path):
    before, after = made_study(grid=TWO), made_study(grid=TWO, settings=OTHER)
    folder = StudyFolder(tmp_path)
    first, second = first_round(before)
    folder.begin(cell_configs(before, [first, second], folder))
    run = folder.run(first)
    run.path.mkdir(parents=True)
    run.config.touch()
    with pytest.raises(ValueError, match="started with other settings"):
        conduct(after, folder, PROGRAM, 1)
    assert json.loads(folder.settings(second).read_text())["optim"]["clip"] == 1.0, "nothing has changed"
    run.config.unlink()
    run.ends.write_text('{"code": 2}\n')
    assert conduct(after, folder, PROGRAM, 1) == 2


def test_a_setting_that_is_newer_than_a_cell_had_its_default(tmp_path: Path):
    study = made_study(grid=ONE)
    folder = StudyFolder(tmp_path)
    conduct(study, folder, PROGRAM, 1)
    path = folder.settings(first_round(study)[0])
    noted = json.loads(path.read_text(encoding="utf-8"))
    del noted["optim"]["matrices"]
    path.write_text(json.dumps(noted), encoding="utf-8")
    assert conduct(study, folder, PROGRAM, 1) == 1
    path.write_text(json.dumps(noted), encoding="utf-8")
    with pytest.raises(ValueError, match=r"started with other settings \(optim.matrices\)"):
        conduct(made_study(grid=ONE, settings={"optim.matrices": "muon"}), folder, PROGRAM, 1)
    path.write_text(json.dumps(noted | {"data": noted["data"] | {"gone_since": 1}}), encoding="utf-8")
    with pytest.raises(ValueError, match="gone_since"):
        conduct(study, folder, PROGRAM, 1)
