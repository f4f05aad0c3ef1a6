"""A study continues where its run folders are, for example on another machine; and the studies that are kept."""

import shutil
import tarfile
from pathlib import Path

import pytest

from relora_mora.experiments.study.conduct import conduct
from relora_mora.experiments.study.design import first_round, read_study
from relora_mora.experiments.study.folder import StudyFolder
from tests.experiments.study.tools import PROGRAM, made_study
from tests.tools.each import each
from tests.tools.helpers import ROOT

CHOOSE = {"over": ["optim.lr"], "lowest": "eval/loss"}


@pytest.mark.more
def test_a_study_continues_elsewhere_from_its_run_folders(tmp_path: Path):
    study = made_study(seeds=[0, 1], choose=CHOOSE)
    here, there = (StudyFolder(tmp_path / name) for name in ("here", "there"))
    conduct(study, here, PROGRAM, 4)
    copied = first_round(study)[:5]
    for cell in copied:
        shutil.copytree(here.run(cell).path, there.run(cell).path)
    assert conduct(study, there, PROGRAM, 4) == 8
    for cell in copied:
        assert there.run(cell).starts.read_bytes() == here.run(cell).starts.read_bytes(), "a run that is done ran again"
    assert {path.name for path in (there.path / "runs").iterdir()} == {
        path.name for path in (here.path / "runs").iterdir()
    }
    less = made_study(grid=[{"method.name": "mora", "method.rank": 16, "optim.lr": [3e-3, 2.5e-3]}])
    assert conduct(less, there, PROGRAM, 1) == 2


@each("archive", sorted((ROOT / "docs/studies").glob("*.tar.gz")))
def test_kept_runs_are_those_of_their_studies(archive: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    shipped, of_release_0_2 = (
        ROOT / folder / archive.name.replace(".tar.gz", ".yaml") for folder in ("configs/study", "docs/studies")
    )
    assert shipped.exists() != of_release_0_2.exists()
    study = read_study(shipped if shipped.exists() else of_release_0_2)
    assert archive.read_bytes()[3:8] == bytes(5), "made with gzip -n: no name and no time, so always the same bytes"
    names = {
        cell.name
        for seed in study.seeds
        for cell in first_round(study.model_copy(update={"seeds": [seed], "choose": None}))
    }
    with tarfile.open(archive) as stream:
        files = [Path(name) for name in stream.getnames()]
    assert {file.parts[1] for file in files if len(file.parts) == 3} <= names
    assert {file.name for file in files if len(file.parts) == 3} == {"config.yaml", "metrics.jsonl", "starts.jsonl"}
