"""A resumed run is bit-equal to one that was never stopped: before, at and after a merge, on every stage."""

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._guards import active_fake_mode

from tests.tools.grids import rest
from tests.tools.runs import checkpoint_at, copy_cut_at, different_tensors, logged_steps, metrics, train

pytestmark = pytest.mark.distributed


def _sections(stage: int, bf16: bool, method: str = "remora") -> dict:
    training = {"zero_stage": stage, "precision": "bf16" if bf16 else "fp32", "deterministic": True}  # for tests/gpu
    return {"train": training, "method": {"name": method}}


def seeds_of_forwards(config: Any) -> list[int]:
    """The seed that this rank draws with in each forward of training, in order."""
    from relora_mora.model.causal import LossModel

    seeds = []
    whole_forward = LossModel.forward

    def forward(self: LossModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.training and active_fake_mode() is None:  # not while memory is measured
            seeds.append(torch.initial_seed())
        return whole_forward(self, *args, **kwargs)

    with mock.patch.object(LossModel, "forward", forward):
        train(config)
    return seeds


@pytest.mark.more
def test_dropout_draws_again_for_every_step_rank_and_micro_batch_and_resumes_bit_equal(runs, pools, tmp_path):
    folders = {name: tmp_path / name for name in ("never", "stopped", "without")}
    configs = {name: runs.config(folder, 2, **_sections(2, False)) for name, folder in folders.items()}
    dropout = {"model": {"overrides": {"attention_dropout": 0.2}}}
    for name in ("never", "stopped"):
        configs[name] = runs.config(folders[name], 2, **_sections(2, False), **dropout)
    seeds = pools(2)(seeds_of_forwards, configs["never"])
    assert [len(of_rank) for of_rank in seeds] == [20, 20]  # two micro-batches in each of ten steps
    assert len({*seeds[0], *seeds[1]}) == 40
    copy_cut_at(folders["never"], folders["stopped"], 4)
    assert pools(2)(seeds_of_forwards, configs["stopped"]) == [of_rank[8:] for of_rank in seeds]
    assert different_tensors(*(checkpoint_at(folders[name], 10) for name in ("never", "stopped"))) == []
    pools(2)(train, configs["without"])
    assert different_tensors(*(checkpoint_at(folders[name], 10) for name in ("never", "without"))) != []


def test_another_config_is_refused_with_all_differences(runs, pools, tmp_path):
    folder = tmp_path / "run"
    runs.train(folder, stop_after=2)
    changed = runs.config(folder, optim={"lr": 0.001}, method={"merge_every": 5}, data={"seed": 7})
    message = runs.refusal(changed)
    for name in ("optim.lr: 0.02 in the checkpoint, 0.001 now", "method.merge_every", "data.seed"):
        assert name in message
    allowed = runs.config(folder, optim={"lr": 0.001}, train={"allow_changes": ["optim.lr"], "steps": 10})
    pools(1)(train, allowed)
    assert metrics(folder)[-1]["step"] == 10
    message = runs.refusal(runs.config(folder, train={"resume": "never"}))
    assert "train.resume=never" in message


def _eval_steps(folder: Path) -> list[int]:
    return logged_steps(folder, "eval/loss")


def test_a_run_that_goes_back_does_not_return_to_abandoned_checkpoints(runs, pools, tmp_path):
    pool, folder = pools(1), tmp_path / "run"
    plain = runs.config(folder)
    pool(train, plain)
    finished = tmp_path / "finished"
    shutil.copytree(checkpoint_at(folder, 10), finished)
    back = runs.config(folder, train={"resume": str(checkpoint_at(folder, 6))})
    pool(train, back, stop_after=8)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {
        "step-00000008",
        "abandoned-step-00000009",
        "abandoned-step-00000010",
    } <= names
    assert "step-00000010" not in names
    pool(train, plain)
    assert different_tensors(finished, checkpoint_at(folder, 10)) == []
    assert _eval_steps(folder) == [0, 5, 10]


def test_a_checkpoint_follows_the_evaluation_and_metrics_of_its_step(runs, pools, tmp_path):
    """A kill right after it must not lose them."""
    folder = tmp_path / "run"
    config = runs.config(folder, 1, eval={"every_steps": 0})
    pools(1)(train, config)
    tags = {"train/loss": "loss", "eval/loss": "eval", "perf/checkpoint_stall_seconds": "save"}
    lines = [kind for line in metrics(folder) for tag, kind in tags.items() if tag in line]
    assert lines[-3:] == ["loss", "eval", "save"]
    assert _eval_steps(folder) == [0, 10]
    assert lines.count("loss") == 10


@pytest.mark.more
@pytest.mark.parametrize("method", ["remora", *rest(("relora",))])
def test_a_longer_run_does_the_merge_that_the_last_step_left_out(runs, tmp_path, method):
    long, short = tmp_path / "long", tmp_path / "short"
    constant = {"schedule": "constant"}  # otherwise another train.steps changes the rates
    settings = {"method": {"name": method}, "optim": constant}
    runs.train(long, 2, **settings)
    runs.train(short, 2, train={"steps": 8}, **settings)
    assert logged_steps(short, "merge/layers") == [4]
    runs.train(short, 2, train={"allow_changes": ["train.steps"]}, **settings)
    assert different_tensors(*(checkpoint_at(folder, 10) for folder in (long, short))) == []
    assert _merges(short) == _merges(long) != []


def _merges(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics that merges wrote, without times."""
    lines = [line for line in metrics(run) if "merge/layers" in line]
    return [{tag: value for tag, value in line.items() if tag not in ("time", "merge/seconds")} for line in lines]
