"""A study that has changed since its runs began is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relora_mora.experiments.study.conduct import CellsFailed, conduct
from relora_mora.experiments.study.design import first_round
from relora_mora.experiments.study.folder import StudyFolder, cell_configs
from tests.experiments.study.tools import PROGRAM, made_study
from tests.tools.each import each


def test_a_changed_setting_is_not_mixed_with_runs_before(tmp_path: Path):
    grid = [{"optim.lr": [1.0]}]
    folder = StudyFolder(tmp_path)
    with pytest.raises(CellsFailed):
        conduct(made_study(grid=grid, settings={"method.name": "mora"}), folder, PROGRAM, 1)
    with pytest.raises(ValueError, match=r"started with other settings \(optim.clip\); remove .*lr=1.0,seed=0"):
        conduct(made_study(grid=grid, settings={"method.name": "mora", "optim.clip": 3.0}), folder, PROGRAM, 1)


def test_a_changed_setting_is_refused_even_if_all_runs_are_done(tmp_path: Path):
    grid = [{"method.name": "mora", "optim.lr": 3e-3}]
    folder = StudyFolder(tmp_path)
    conduct(made_study(grid=grid), folder, PROGRAM, 1)
    for _ in ("from its settings", "from its record"):
        with pytest.raises(ValueError, match=r"started with other settings \(optim.clip\); remove .*lr=0.003,seed=0"):
            conduct(made_study(grid=grid, settings={"optim.clip": 3.0}), folder, PROGRAM, 1)
        for settings in (tmp_path / "settings").iterdir():
            settings.unlink()


def test_cells_that_never_ran_may_change(tmp_path: Path):
    grid = [{"method.name": "mora", "optim.lr": [3e-3, 1e-2]}]
    folder = StudyFolder(tmp_path)
    before = made_study(grid=grid)
    folder.begin(cell_configs(before, first_round(before), folder))
    assert conduct(made_study(grid=grid, settings={"optim.clip": 3.0}), folder, PROGRAM, 1) == 2


def test_a_start_that_is_refused_changes_nothing(tmp_path: Path):
    grid = [{"method.name": "mora", "optim.lr": [3e-3, 1e-2]}]
    study = made_study(grid=grid)
    folder = StudyFolder(tmp_path)
    first, second = first_round(study)
    folder.begin(cell_configs(study, [first, second], folder))
    folder.run(first).path.mkdir(parents=True)
    folder.run(first).config.touch()
    with pytest.raises(ValueError, match="started with other settings"):
        conduct(made_study(grid=grid, settings={"optim.clip": 3.0}), folder, PROGRAM, 1)
    assert folder.given(second)["optim"]["clip"] == 1.0


@each("text", ["", "{", "3"])
def test_truncated_settings_are_reported(tmp_path: Path, text: str):
    study = made_study(grid=[{"method.name": "mora", "optim.lr": 3e-3}])
    folder = StudyFolder(tmp_path)
    conduct(study, folder, PROGRAM, 1)
    [settings] = (tmp_path / "settings").iterdir()
    settings.write_text(text)
    with pytest.raises(
        ValueError, match=r"lr=0\.003,seed=0 was started with settings that cannot be read, .*; remove "
    ):
        conduct(study, folder, PROGRAM, 1)


def test_runs_that_found_a_fault_in_their_settings_have_not_begun(tmp_path: Path):
    grid = [{"method.name": "mora", "optim.lr": [3e-3, 1e-2]}]
    folder = StudyFolder(tmp_path)
    study = made_study(grid=grid)
    folder.begin(cell_configs(study, first_round(study), folder))
    for cell in first_round(study):
        folder.run(cell).path.mkdir(parents=True)
        folder.run(cell).ends.write_text('{"code": 2}\n')
    changed = made_study(grid=grid, settings={"optim.clip": 3.0})
    assert conduct(changed, folder, PROGRAM, 1) == 2
    with pytest.raises(ValueError) as refused:
        conduct(study, folder, PROGRAM, 1)
    assert str(refused.value).count("was started with other settings (optim.clip)") == 2


def test_a_newer_setting_had_its_default(tmp_path: Path):
    study = made_study(grid=[{"method.name": "mora", "optim.lr": 3e-3}])
    folder = StudyFolder(tmp_path)
    conduct(study, folder, PROGRAM, 1)
    path = folder.settings(first_round(study)[0])
    noted = json.loads(path.read_text(encoding="utf-8"))
    del noted["optim"]["matrices"]
    path.write_text(json.dumps(noted), encoding="utf-8")
    assert conduct(study, folder, PROGRAM, 1) == 1
    path.write_text(json.dumps(noted), encoding="utf-8")
    with pytest.raises(ValueError, match=r"started with other settings \(optim.matrices\)"):
        conduct(made_study(grid=study.grid, settings={"optim.matrices": "muon"}), folder, PROGRAM, 1)
    path.write_text(json.dumps(noted | {"data": noted["data"] | {"gone_since": 1}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"or that this version does not know; remove"):
        conduct(study, folder, PROGRAM, 1)
