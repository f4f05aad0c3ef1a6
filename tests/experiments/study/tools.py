"""A small study, and the stand-in for the script that trains."""

from pathlib import Path
from typing import Any

from relora_mora.experiments.study.design import Study
from tests.tools.helpers import ROOT

BASE = str(ROOT / "configs/run/tiny_mora.yaml")
TRAINER = Path(__file__).with_name("trainer.py")
PROGRAM = [str(TRAINER)]  # as arguments of Python
RATES = [1e-3, 3e-3, 1e-2]


def made_study(**changes: Any) -> Study:
    grid = [{"method.name": "mora", "method.rank": [8, 16], "optim.lr": RATES}]
    return Study.model_validate({"base": BASE, "grid": grid} | changes)
