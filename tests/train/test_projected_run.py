"""Runs with the optimizers that keep a state of whole matrices, and Muon with Polar Express.

They resume to the bit, move between ranks and stages, and keep their rank.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_mora.config.registry import MATRIX_OPTIMIZERS
from tests.tools.grids import rest
from tests.tools.runs import (
    assert_resumes_are_bit_equal,
    checkpoint_at,
    copy_cut_at,
    logged_values,
    refusal_of,
    run_config,
    tensors,
    train,
)

pytestmark = pytest.mark.distributed

PROJECTED = {"projection_rank": 4, "projection_every": 3}  # renewed in the steps 1, 4 and 7, or 1, 4, 5 and 8


@pytest.fixture
def config(inputs, tokenizer_path):
    """The settings of a run of full rank in a folder."""

    def make(folder: Path, world_size: int = 1, **sections: dict[str, Any]) -> Any:
        sections = {"method": {"name": "full"}, **sections, "optim": PROJECTED | sections.get("optim", {})}
        return run_config(inputs, tokenizer_path, folder, world_size, **sections)

    return make


CASES = [(2, "full", "galore", "apollo_mini", 0, False)]
CASES += [(2, "full", "fira", "adamw8bit", 3, True), (1, "remora", "apollo", "adamw8bit", 1, True)]
TRIED = {"adamw", "muon", "lora_muon", *(case[2] for case in CASES)}  # test_resume.py and test_muon_run.py have these
OTHERS = [(2, "full", matrices, "adamw", 2, True) for matrices in MATRIX_OPTIMIZERS if matrices not in TRIED]
ELSEWHERE = ("polar_muon", "adamw8bit")  # one keeps what Muon keeps, and Fira's case has the other
CASES += [case for case in OTHERS if case[2] not in ELSEWHERE]
CASES += rest(*(case for case in OTHERS if case[2] in ELSEWHERE))
CASES += rest((2, "full", "fira", "adamw8bit", 0, True), (2, "full", "galore", "apollo_mini", 2, False))
CASES += rest((2, "remora", "normuon", "adamw", 3, False), (1, "remora", "sumo", "adamw", 1, True))


@pytest.mark.parametrize("world,method,matrices,others,stage,bf16", CASES)
def test_a_resume_is_bit_equal(pools, config, tmp_path, world, method, matrices, others, stage, bf16):
    """Before a renewal and after one, which is also a merge of remora."""
    sections = {
        "method": {"name": method},
        "optim": {"matrices": matrices, "others": others},
        "train": {"zero_stage": stage, "precision": "bf16" if bf16 else "fp32", "steps": 8},
    }
    assert_resumes_are_bit_equal(pools(world), partial(config, world_size=world, **sections), tmp_path)


UNSCORED_STEPS = (1, 2, 6, 7, 9)  # projections are due in the steps 1 to 3 and 6 to 8


def partly_unscored(config: Any) -> None:
    """Trains, but no token of those steps is scored, as within a long prompt."""
    from relora_mora.data.stream.packing import UNSCORED
    from relora_mora.train.loop.loop import Trainer
    from relora_mora.train.loop.step import LocalBatch

    whole_step = Trainer.train_step

    def train_step(self: Trainer, share: LocalBatch) -> Any:
        if self.state.step + 1 in UNSCORED_STEPS:
            labels = torch.full_like(share.batch.labels, UNSCORED)
            share = LocalBatch(replace(share.batch, labels=labels), scored=0)
        return whole_step(self, share)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        train(config)


def _linears(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Their masters in a checkpoint, by key."""
    found = tensors(checkpoint_at(run, step))
    return {key: value for key, value in found.items() if key.startswith("master|") and "_proj" in key}


def _equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[bool]:
    assert found.keys() == expected.keys()
    return [torch.equal(value, expected[key]) for key, value in found.items()]


@pytest.mark.parametrize("matrices,stage", [("galore", 1), *rest(("fira", 0), ("galore", 2), ("fira", 3), ("sumo", 2))])
def test_a_projection_waits_for_a_scored_step(pools, config, tmp_path, matrices, stage):
    """On every stage, and also after a resume within the wait."""
    train_settings = {"steps": 10, "micro_batch_size": 1}
    make = partial(config, world_size=2, optim={"matrices": matrices}, train=train_settings | {"zero_stage": stage})
    one_rank, run = tmp_path / "one_rank", tmp_path / "run"
    pools(1)(partly_unscored, config(one_rank, optim={"matrices": matrices}, train=train_settings | {"zero_stage": 0}))
    pools(2)(partly_unscored, make(run))
    assert len(logged_values(run)) == 5
    assert logged_values(run) == pytest.approx(logged_values(one_rank), rel=0, abs=1e-5)
    for waits, before, after in ((True, 1, 2), (False, 2, 3), (True, 5, 7), (False, 7, 8), (False, 8, 9)):
        assert set(_equal(_linears(run, before), _linears(run, after))) == {waits}, f"steps {before} to {after}"
    assert max(float(value.abs().max()) for value in _linears(run, 10).values()) < 0.2
    resumed = tmp_path / "resumed"
    copy_cut_at(run, resumed, 6)
    pools(2)(partly_unscored, make(resumed, checkpoint={"every_steps": 0}))
    assert all(_equal(_linears(resumed, 10), _linears(run, 10)))


MOVES = [(1, 0, 2, 3, "adamw8bit"), (2, 1, 4, 2, "apollo_mini")]
MOVES += rest((2, 3, 1, 2, "adamw8bit"), (2, 0, 1, 1, "apollo_mini"))


@pytest.mark.parametrize("world,stage,to_world,to_stage,others", MOVES)
def test_a_moved_run_continues_as_if_it_had_not_moved(
    pools, config, tmp_path_factory, tmp_path, world, stage, to_world, to_stage, others
):
    folder = tmp_path / "run"
    reference = tmp_path_factory.getbasetemp() / f"fira-and-{others}-that-never-moved"
    fira = {"matrices": "fira", "others": others}
    small = {"micro_batch_size": 1, "steps": 9}  # a merge or a renewal follows the move
    if not checkpoint_at(reference, 9).exists():
        pools(1)(train, config(reference, optim=fira, train={"zero_stage": 0} | small))
    pools(world)(train, config(folder, world, optim=fira, train={"zero_stage": stage} | small), stop_after=5)
    large = small | {"micro_batch_size": 2}
    pools(to_world)(train, config(folder, to_world, optim=fira, train={"zero_stage": to_stage} | large))
    near = 1e-4 if others == "adamw8bit" else 1e-5  # sums in another order change a few codes by one
    assert logged_values(folder) == pytest.approx(logged_values(reference), rel=0, abs=near)
    assert len(logged_values(folder)) == 9


STORED = [("galore", "adamw8bit", 2), ("apollo", "apollo_mini", 0), ("normuon", "adamw", 2), ("sumo", "adamw", 0)]
STORED += rest(*((matrices, others, 2 - stage) for matrices, others, stage in STORED))


@pytest.mark.parametrize("matrices,others,stage", STORED)
def test_a_checkpoint_holds_the_state_of_each_matrix_once(pools, config, tmp_path, matrices, others, stage):
    optim = {"matrices": matrices, "others": others}
    pools(2)(train, config(tmp_path / "run", 2, optim=optim, train={"zero_stage": stage}), stop_after=1)
    found: dict[str, set[str]] = {}
    for key, value in tensors(checkpoint_at(tmp_path / "run", 1)).items():
        kind, name, start = key.split("|")
        found.setdefault(name, set()).add(kind)
        if "down_proj" in name and kind.startswith(("proj", "row")):  # [24, 40]
            assert start == "0"
            assert list(value.shape) == {"projection": [24, 4], "row_avg_sq": [24]}.get(kind, [4, 40])
    assert len(found) == 2 * 7 + 2 + 5  # linears, embeddings and head, norms
    moments = {"exp_avg", "exp_avg_sq"}
    projected = {"projected_avg", "projected_avg_sq", "updates"}
    codes = {f"{moment}_{part}" for moment in moments for part in ("codes", "scales")} | {"updates"}
    of_optimizer = {"apollo": projected | {"limited_norm"}, "galore": projected | {"projection"}, "adamw8bit": codes}
    of_optimizer |= {"apollo_mini": of_optimizer["apollo"], "adamw": moments, "normuon": {"momentum", "row_avg_sq"}}
    of_optimizer["sumo"] = {"projected_avg", "projection", "limited_norm", "updates"}
    for name, kinds in found.items():
        expected = of_optimizer[matrices if "_proj" in name else others] if "norm" not in name else moments
        assert kinds == {"master"} | expected, name


def test_a_resume_with_another_rank_or_rule_cannot_be_allowed(pools, config, tmp_path):
    folder = tmp_path / "run"
    pools(1)(train, config(folder, optim={"matrices": "galore"}), stop_after=1)
    for name, value in (("projection_rank", 5), ("matrices", "fira"), ("others", "adamw8bit")):
        for allowed in ([], [f"optim.{name}"]):
            changed = {"matrices": "galore", name: value}
            (message,) = pools(1)(refusal_of, config(folder, optim=changed, train={"allow_changes": allowed}))
            assert f"optim.{name}: " in message
            assert f"{value!r} now; " in message
            assert "model.init_from" in message
            assert "to allow" not in message
    (message,) = pools(1)(refusal_of, config(folder, optim={"matrices": "galore", "projection_every": 9}))
    assert "optim.projection_every: 3 in the checkpoint, 9 now; to allow it: '--train.allow_changes" in message


def test_eight_bits_learn_as_much_as_adamw(pools, config, tmp_path):
    losses = {}
    for name in ("adamw", "adamw8bit"):
        optim = {"matrices": name, "others": name}
        pools(1)(train, config(tmp_path / name, optim=optim, train={"steps": 40}, checkpoint={"every_steps": 0}))
        losses[name] = logged_values(tmp_path / name)
    gained = losses["adamw"][0] - losses["adamw"][-1]
    assert gained > 3
    assert losses["adamw8bit"] != losses["adamw"]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], abs=1e-3 * gained)
