"""The contract of a rule in whole runs: they move between ranks and stages, and keep their rule.

Two rules of one's own and 8-bit AdamW; Muon is in test_muon_run.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_mora.config.load import ConfigError
from relora_mora.config.yaml_text import parse_yaml
from relora_mora.optim.own import RuleError
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.system.run_folder import RunFolder
from tests.tools.grids import rest
from tests.tools.rules import matrices_settings
from tests.tools.runs import (
    checkpoint_at,
    copy_cut_at,
    logged_values,
    manifest_at,
    refusal_of,
    run_config,
    tensors,
    train,
)

pytestmark = pytest.mark.distributed

RULE = {"rank": 4, "every": 3}  # the projection is renewed in the steps 1, 4 and 7, or 1, 4, 5 and 8


@pytest.fixture
def config(inputs, tokenizer_path):
    """The settings of a run of full rank in a folder."""

    def make(folder: Path, world_size: int = 1, **sections: dict[str, Any]) -> Any:
        sections = {"method": {"name": "full"}, **sections}
        return run_config(inputs, tokenizer_path, folder, world_size, **sections)

    return make


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


@pytest.mark.more
@pytest.mark.parametrize("stage", [3, *rest((1,))])
def test_a_rule_may_wait_for_a_scored_step(pools, config, tmp_path, stage):
    """GaLore computes no projection from zeros: on every stage, and also after a resume within the wait."""
    galore = matrices_settings("galore", **RULE)
    train_settings = {"steps": 10, "micro_batch_size": 1}
    make = partial(config, world_size=2, optim=galore, train=train_settings | {"zero_stage": stage})
    one_rank, run = tmp_path / "one_rank", tmp_path / "run"
    pools(1)(partly_unscored, config(one_rank, optim=galore, train=train_settings | {"zero_stage": 0}))
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


MOVES = [(1, 0, 2, 3, "galore", "adamw8bit")]
MOVES += rest((2, 1, 4, 2, "galore", "adamw"), (4, 3, 2, 2, "apollo", "adamw"))


@pytest.mark.more
@pytest.mark.parametrize("world,stage,to_world,to_stage,matrices,others", MOVES)
def test_a_moved_run_continues_as_if_it_had_not_moved(
    pools, config, tmp_path_factory, tmp_path, world, stage, to_world, to_stage, matrices, others
):
    folder = tmp_path / "run"
    reference = tmp_path_factory.getbasetemp() / f"{matrices}-and-{others}-that-never-moved"
    optim = {**matrices_settings(matrices, **RULE), "others": others}
    small = {"micro_batch_size": 1, "steps": 9}  # a renewal follows the move
    if not checkpoint_at(reference, 9).exists():
        pools(1)(train, config(reference, optim=optim, train={"zero_stage": 0} | small))
    pools(world)(train, config(folder, world, optim=optim, train={"zero_stage": stage} | small), stop_after=5)
    large = small | {"micro_batch_size": 2}
    pools(to_world)(train, config(folder, to_world, optim=optim, train={"zero_stage": to_stage} | large))
    near = 1e-4 if others == "adamw8bit" else 1e-5  # sums in another order change a few codes by one
    assert logged_values(folder) == pytest.approx(logged_values(reference), rel=0, abs=near)
    assert len(logged_values(folder)) == 9


@pytest.mark.more
@pytest.mark.parametrize("matrices,others,stage", [("galore", "adamw8bit", 2), *rest(("apollo", "adamw", 0))])
def test_a_checkpoint_holds_the_state_of_each_matrix_once(pools, config, tmp_path, matrices, others, stage):
    optim = {**matrices_settings(matrices, **RULE), "others": others}
    pools(2)(train, config(tmp_path / "run", 2, optim=optim, train={"zero_stage": stage}), stop_after=1)
    found: dict[str, set[str]] = {}
    for key, value in tensors(checkpoint_at(tmp_path / "run", 1)).items():
        kind, name, start = key.split("|")
        found.setdefault(name, set()).add(kind)
        if "down_proj" in name and kind in ("average", "squares", "projection"):  # [24, 40]
            assert start == "0"
            assert list(value.shape) == ([24, 4] if kind == "projection" else [4, 40])
    assert len(found) == 2 * 7 + 2 + 5  # linears, embeddings and head, norms
    moments = {"exp_avg", "exp_avg_sq"}
    codes = {f"{moment}_{part}" for moment in moments for part in ("codes", "scales")} | {"updates"}
    states = {"average", "squares", "updates"}
    of_optimizer = {"galore": states | {"projection"}, "apollo": states | {"limited_norm"}}
    of_optimizer |= {"adamw8bit": codes, "adamw": moments}
    for name, kinds in found.items():
        expected = of_optimizer[matrices if "_proj" in name else others] if "norm" not in name else moments
        assert kinds == {"master"} | expected, name


@pytest.mark.more
def test_a_resume_with_another_rule_is_refused(pools, config, tmp_path):
    """Another optimizer, and other shapes of the state, cannot be allowed."""
    folder = tmp_path / "run"
    galore = matrices_settings("galore", **RULE)
    pools(1)(train, config(folder, optim=galore), stop_after=1)
    apollo = matrices_settings("apollo", **RULE)["matrices"]
    for name, value in (("matrices", apollo), ("matrices", "muon"), ("others", "adamw8bit")):
        for allowed in ([], [f"optim.{name}"]):
            changed = {**galore, name: value}
            (message,) = pools(1)(refusal_of, config(folder, optim=changed, train={"allow_changes": allowed}))
            assert f"optim.{name}: " in message
            assert "model.init_from" in message
            assert "to allow" not in message
    (message,) = pools(1)(refusal_of, config(folder, optim=matrices_settings("galore", rank=4, every=9)))
    assert "optim.rule: " in message
    assert "to allow it: '--train.allow_changes=[optim.rule]'" in message
    other_rank = {"optim": matrices_settings("galore", rank=5, every=3), "train": {"allow_changes": ["optim.rule"]}}
    (message,) = pools(1)(refusal_of, config(folder, **other_rank))
    assert "other shapes or states" in message


@pytest.mark.more
def test_a_resume_with_another_file_must_be_allowed(pools, config, tmp_path):
    """Another folder need not; a run's own settings ask for the file that they were made with."""
    source = Path(matrices_settings("galore")["matrices"].partition(":")[0]).read_text()
    file = tmp_path / "galore.py"
    file.write_text(source)
    optim = {"matrices": f"{file}:GaLore", "rule": RULE}
    folder = tmp_path / "run"
    pools(1)(train, config(folder, optim=optim), stop_after=1)
    digest = read_settings(folder)["optim"]["rule_digest"]
    assert manifest_at(folder, 1)["config"]["optim"]["rule_digest"] == digest is not None
    pools(1)(train, config(folder, optim=matrices_settings("galore", **RULE)), stop_after=2)
    file.write_text(source + "# changed")
    (message,) = pools(1)(refusal_of, config(folder, optim=optim))
    assert "optim.rule_digest: " in message
    assert "to allow it: '--train.allow_changes=[optim.rule_digest]'" in message
    (message,) = pools(1)(refusal_of, config(folder, optim={**optim, "rule_digest": digest}), RuleError)
    assert message.startswith("optim.rule_digest: ")
    pools(1)(train, config(folder, optim=optim, train={"allow_changes": ["optim.rule_digest"]}), stop_after=3)
    assert read_settings(folder)["optim"]["rule_digest"] != digest


def read_settings(folder: Path) -> dict[str, Any]:
    return parse_yaml(RunFolder(folder).config.read_text())


def refused_on(world_size: int, settings: Any, files: list[str]) -> str:
    """The refusal of a rank that has a file of its own."""
    from torch import distributed as dist

    matrices = f"{files[dist.get_rank()]}:GaLore"
    optim = settings.optim.model_copy(update={"matrices": matrices})
    return refusal_of(settings.model_copy(update={"optim": optim}), ConfigError)


def test_ranks_with_other_files_are_refused(pools, config, tmp_path):
    source = Path(matrices_settings("galore")["matrices"].partition(":")[0]).read_text()
    files = []
    for number in range(2):
        path = tmp_path / str(number) / "galore.py"
        path.parent.mkdir()
        path.write_text(source + f"# {number}")
        files.append(str(path))
    for message in pools(2)(refused_on, 2, config(tmp_path / "run", 2), files):
        assert "optim.rule_digest" in message


def limits_of_steps(config: Any) -> set[float | None]:
    """The seconds that the watchdog allows for an update of a run."""
    limits = []
    begin = Guard.begin

    def noted(self: Guard, action: str, within: float | None = None) -> None:
        if action.endswith(": optimizer"):
            limits.append(within)
        begin(self, action, within=within)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "begin", noted)
        train(config, stop_after=1)
    return set(limits)


@pytest.mark.more
@pytest.mark.parametrize("matrices,limit", [("galore", LONG_SECONDS), ("apollo", None)])
def test_a_slow_rule_has_more_time(pools, config, tmp_path, matrices, limit):
    settings = config(tmp_path / "run", optim=matrices_settings(matrices, **RULE))
    assert pools(1)(limits_of_steps, settings) == [{limit}]


@pytest.mark.more
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
