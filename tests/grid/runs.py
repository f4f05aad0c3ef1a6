"""A case of the covering grid: a whole run, which is compared with plain torch, stops, and resumes to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from relora_mora.config.registry import METHODS
from relora_mora.config.schema import Config
from tests.grid.cases import STOPS, bound, choice, sections_of
from tests.tools.grids import Case
from tests.tools.reference import PlainRun, Tokens
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

Make = Callable[..., Config]


def trained(config: Any, *, with_kernels: bool) -> list[Tokens]:
    """Trains with the compiled kernels or only with torch; returns this rank's batches."""
    from relora_mora.kernels import ops

    batches: list[Tokens] = []

    def watch(trainer: Any, share: Any) -> None:
        batches.append((share.batch.input_ids.clone(), share.batch.labels.clone()))

    with mock.patch.object(ops, "enabled", with_kernels):
        train(config, watch=watch)
    return batches


def compare(
    make: Make, pools: Any, world: int, folder: Path, *, stop: int, rel: float, with_kernels: bool = True
) -> Path:
    """Trains the run that ``make`` gives for a folder, as plain torch does; a resume after step ``stop`` makes the same
    run. Returns the folder of the first one."""
    never, resumed = folder / "never", folder / "resumed"
    config = make(never)
    shares = pools(world)(trained, config, with_kernels=with_kernels)
    losses = logged_values(never)
    batches = [tuple(torch.cat(parts) for parts in zip(*each, strict=True)) for each in zip(*shares, strict=True)]
    expected = PlainRun(config).train(batches)
    assert losses == pytest.approx(expected, rel=rel)
    copy_cut_at(never, resumed, stop)
    pools(world)(trained, make(resumed, checkpoint={"every_steps": 0}), with_kernels=with_kernels)
    assert different_tensors(*(checkpoint_at(run, config.train.steps) for run in (never, resumed))) == []
    assert logged_values(resumed) == losses
    evaluations = [
        [(line["step"], line["eval/loss"]) for line in metrics(run) if "eval/loss" in line] for run in (never, resumed)
    ]
    assert evaluations[0] == evaluations[1]
    return never


def check_run(case: Case, pools: Any, ranks: int, inputs: Path, tokenizer: str, folder: Path) -> None:
    """Trains a case over a merge, on at most so many ``ranks``, stops it and resumes it."""
    world = min(case["ranks"], ranks)
    with_kernels = case["kernels"] == "compiled"

    def make(run: Path, **changes: dict[str, Any]) -> Config:
        return run_config(inputs, tokenizer, run, world, **sections_of(case), **changes)

    run = compare(make, pools, world, folder, stop=choice(case, STOPS), rel=bound(case), with_kernels=with_kernels)
    assert logged_steps(run, "merge/layers") == ([3, 6] if METHODS[case["method"]].merges else [])
    assert logged_steps(run, "eval/loss") == [0, 3, 6, 7]
