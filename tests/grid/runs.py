"""A case of the covering grid: a whole run, which is compared with plain torch, stops, and resumes to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from relora_mora.config.registry import METHODS
from tests.grid.cases import STEPS, STOPS, bound, choice, sections_of
from tests.tools.grids import Case
from tests.tools.reference import PlainRun, Tokens, model_config_of
from tests.tools.runs import (
    checkpoint_at,
    copy_cut_at,
    different_tensors,
    logged_steps,
    logged_values,
    metrics,
    run_config,
    train,
)


def trained(config: Any, *, with_kernels: bool) -> list[Tokens]:
    """Trains with the compiled kernels or only with torch; returns this rank's batches."""
    from relora_mora.kernels import ops

    batches: list[Tokens] = []

    def watch(trainer: Any, share: Any) -> None:
        batches.append((share.batch.input_ids.clone(), share.batch.labels.clone()))

    with mock.patch.object(ops, "enabled", with_kernels):
        train(config, watch=watch)
    return batches


def check_run(case: Case, pools: Any, ranks: int, inputs: Path, tokenizer: str, folder: Path) -> None:
    """Trains a case over a merge, on at most so many ``ranks``; a resume after one of the steps makes the same run."""
    world = min(case["ranks"], ranks)
    never, resumed = folder / "never", folder / "resumed"
    config = run_config(inputs, tokenizer, never, world, **sections_of(case))
    with_kernels = case["kernels"] == "compiled"
    shares = pools(world)(trained, config, with_kernels=with_kernels)
    losses = logged_values(never)
    batches = [tuple(torch.cat(parts) for parts in zip(*each, strict=True)) for each in zip(*shares, strict=True)]
    expected = PlainRun(config, model_config_of(config)).train(batches)
    assert losses == pytest.approx(expected, rel=bound(case))
    merges = [3, 6] if METHODS[case["method"]].merges else []
    assert logged_steps(never, "merge/layers") == merges
    copy_cut_at(never, resumed, choice(case, STOPS))
    again = run_config(inputs, tokenizer, resumed, world, checkpoint={"every_steps": 0}, **sections_of(case))
    pools(world)(trained, again, with_kernels=with_kernels)
    assert different_tensors(*(checkpoint_at(folder, STEPS) for folder in (never, resumed))) == []
    assert logged_values(resumed) == losses
    evaluations = [
        [(line["step"], line["eval/loss"]) for line in metrics(folder) if "eval/loss" in line]
        for folder in (never, resumed)
    ]
    assert evaluations[0] == evaluations[1]
    assert [step for step, _ in evaluations[0]] == [0, 3, 6, 7]
