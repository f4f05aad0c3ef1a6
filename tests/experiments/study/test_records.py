"""A study continues from only its records, for example on another machine."""

import gzip
import json
from pathlib import Path

import pytest

from relora_mora.experiments.study.conduct import conduct
from relora_mora.experiments.study.design import first_round, read_study
from relora_mora.experiments.study.folder import StudyFolder
from relora_mora.system.run_folder import read_json_lines
from tests.experiments.study.tools import PROGRAM, made_study
from tests.tools.each import each
from tests.tools.helpers import ROOT

CHOOSE = {"over": ["optim.lr"], "lowest": "eval/loss"}


@pytest.mark.more
def test_a_study_continues_elsewhere_from_its_records(tmp_path: Path):
    study = made_study(seeds=[0, 1], choose=CHOOSE)
    here, folder = (StudyFolder(tmp_path / name) for name in ("here", "there"))
    conduct(study, here, PROGRAM, 4)
    folder.path.mkdir()
    before = here.records.read_text(encoding="utf-8").splitlines(keepends=True)[:5]
    folder.records.write_text("".join(before), encoding="utf-8")
    assert conduct(study, folder, PROGRAM, 4) == 8
    names = [record["name"] for record in read_json_lines(folder.records)]
    lines = folder.records.read_text(encoding="utf-8").splitlines(keepends=True)
    assert lines[:5] == before
    assert {path.name for path in (folder.path / "runs").iterdir()} == set(names[5:]), "a cell with a record is not run"
    assert names[-2:] == ["name=mora,rank=8,lr=0.003,seed=1", "name=mora,rank=16,lr=0.003,seed=1"]

    less = made_study(grid=[{"method.name": "mora", "method.rank": 16, "optim.lr": [3e-3, 2.5e-3]}])
    assert conduct(less, folder, PROGRAM, 1) == 2
    ranked, new, *others = folder.records.read_text(encoding="utf-8").splitlines(keepends=True)
    assert json.loads(new)["name"] == "name=mora,rank=16,lr=0.0025,seed=0"
    assert sorted([ranked, *others]) == sorted(lines), "records that the grid no longer names stay"


@each("records", sorted((ROOT / "docs/studies").glob("*.jsonl.gz")))
def test_records_in_the_documents_match_the_studies(tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    shipped, of_release_0_2 = (
        ROOT / folder / records.name.replace(".jsonl.gz", ".yaml") for folder in ("configs/study", "docs/studies")
    )
    assert shipped.exists() != of_release_0_2.exists()
    study = read_study(shipped if shipped.exists() else of_release_0_2)
    folder = StudyFolder(tmp_path)
    assert records.read_bytes()[3:8] == bytes(5), "made with gzip -n: no name and no time, so always the same bytes"
    folder.records.write_bytes(gzip.decompress(records.read_bytes()))
    names = {
        cell.name
        for seed in study.seeds
        for cell in first_round(study.model_copy(update={"seeds": [seed], "choose": None}))
    }
    assert folder.kept().keys() <= names


def test_of_many_steps_some_are_kept_whole(tmp_path: Path):
    study = made_study(grid=[{"method.name": "mora", "optim.lr": 3e-3}])
    folder = StudyFolder(tmp_path)
    conduct(study, folder, PROGRAM, 1)
    folder.records.unlink()
    [cell] = first_round(study)
    with folder.run(cell).metrics.open("a", encoding="utf-8") as stream:
        for step in range(1001, 1101):
            for line in ({"merge/layers": 28}, {"train/loss": 4.0, "train/lr": 1e-3}):
                stream.write(json.dumps({"step": step, **line}) + "\n")
    assert conduct(study, folder, PROGRAM, 1) == 1
    [record] = read_json_lines(folder.records)
    training, evaluated = ([line for line in record["metrics"] if tag in line] for tag in ("train/loss", "eval/loss"))
    assert [line["step"] for line in training] == [500, *range(1003, 1101, 3), 1100]
    assert training[-1] == {"step": 1100, "train/loss": 4.0, "train/lr": 1e-3}
    assert [line["step"] for line in evaluated] == [1000]
    assert len(record["metrics"]) == len(training) + 1
