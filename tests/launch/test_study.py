"""launch/study.py: what it says of bad arguments; `make study-smoke` runs it."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.tools.commands import call, refused
from tests.tools.helpers import ROOT

STUDY = "launch/study.py"


def test_bad_arguments_are_told_before_anything_runs(tmp_path: Path):
    missing = tmp_path / "none.yaml"
    refused(call(STUDY, missing), "none.yaml", "No such file")
    study = tmp_path / "study.yaml"
    study.write_text(yaml.dump({"base": "nowhere.yaml", "grid": [{"optim.lr": 1e-3}]}), encoding="utf-8")
    refused(call(STUDY, study, "--jobs=0"), "--jobs: got 0")
    refused(call(STUDY, study, f"--out={tmp_path / 'out'}"), "nowhere.yaml", "cannot read it")
    study.write_text("grid: [", encoding="utf-8")
    refused(call(STUDY, study), "study.yaml", "not YAML")
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_done_cannot_be_made_again(tmp_path: Path):
    study = ROOT / "configs/study/smoke.yaml"
    refused(call(STUDY, study, f"--out={tmp_path}", "--again=nothing"), "--again: no run nothing", "there are: none")
