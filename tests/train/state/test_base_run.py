"""Runs whose frozen weights are stored in 8 bits: resumes are bit-equal, and ``method.base`` may change at a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.runs import checkpoint_at, logged_values, tensors, train

pytestmark = pytest.mark.distributed


def _sections(stage: int, **method: Any) -> dict[str, Any]:
    training = {"zero_stage": stage, "precision": "bf16"}
    return {"train": training, "method": {"merge_every": 3, "base_products": True, **method}}


def _base(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors(checkpoint_at(folder, step)).items() if "base" in key}


def test_the_base_may_change_at_every_resume_and_loses_nothing(runs, pools, tmp_path):
    run_dir = tmp_path / "run"
    before: dict[str, torch.Tensor] = {}
    for steps, base, form in ((4, None, "auto"), (5, "int8", "auto"), (7, "fp8", "decoupled"), (8, None, "merged")):
        sections = _sections(2, base=base, form=form)
        config = runs.config(run_dir, 1, **sections)
        pools(1)(train, config, stop_after=steps)
        after = _base(run_dir, steps)
        assert len(after) == 14
        merged = steps == 7  # steps 3 and 6 merge
        assert not before or all(torch.equal(before[key], after[key]) != merged for key in after)
        before = after
    values = logged_values(run_dir)
    assert len(values) == 8
