"""Whole runs with Muon: they move between ranks and stages, and keep their rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.tools.grids import rest
from tests.tools.runs import (
    checkpoint_at,
    logged_values,
    refusal_of,
    run_config,
    tensors,
    train,
)

pytestmark = pytest.mark.distributed

MUON = {"matrices": "muon", "momentum": 0.9}


@pytest.fixture
def config(inputs, tokenizer_path):
    """The settings of a run in a folder; merges after the steps 4 and 8."""

    def make(folder: Path, world_size: int = 1, **sections: dict[str, Any]) -> Any:
        sections = {**sections, "optim": MUON | sections.get("optim", {})}
        return run_config(inputs, tokenizer_path, folder, world_size, **sections)

    return make


MOVES = [(4, 3, 1, 0), *rest((1, 0, 2, 3), (2, 2, 4, 1))]


@pytest.mark.more
@pytest.mark.parametrize("world,stage,to_world,to_stage", MOVES)
def test_a_moved_run_continues_as_if_it_had_not_moved(
    pools, config, tmp_path_factory, tmp_path, world, stage, to_world, to_stage
):
    folder = tmp_path / "run"
    reference = tmp_path_factory.getbasetemp() / "muon-that-never-moved"
    small = {"micro_batch_size": 1, "steps": 9}  # a merge follows the move
    if not checkpoint_at(reference, 9).exists():
        pools(1)(train, config(reference, train={"zero_stage": 0} | small))
    pools(world)(train, config(folder, world, train={"zero_stage": stage} | small), stop_after=5)
    large = small | {"zero_stage": to_stage, "micro_batch_size": 2}
    pools(to_world)(train, config(folder, to_world, train=large))
    assert logged_values(folder) == pytest.approx(logged_values(reference), rel=0, abs=1e-5)
    assert len(logged_values(folder)) == 9


@pytest.mark.more
def test_a_checkpoint_holds_one_moment_of_matrices(pools, config, tmp_path):
    pools(2)(train, config(tmp_path / "run", 2), stop_after=1)
    kinds: dict[str, set[str]] = {}
    for key in tensors(checkpoint_at(tmp_path / "run", 1)):
        kind, name, _ = key.split("|")
        if kind != "base":
            kinds.setdefault(name, set()).add(kind)
    assert len(kinds) == 2 * 7 + 2 + 5  # adapters, embeddings and head, norms
    for name, found in kinds.items():
        assert found == ({"master", "momentum"} if "mora_M" in name else {"master", "exp_avg", "exp_avg_sq"}), name


@pytest.mark.more
def test_a_resume_with_another_optimizer_cannot_be_allowed(pools, config, tmp_path):
    folder = tmp_path / "run"
    pools(1)(train, config(folder), stop_after=1)
    for allowed in ([], ["optim.matrices"]):
        changed = config(folder, optim={"matrices": "adamw"}, train={"allow_changes": allowed})
        (message,) = pools(1)(refusal_of, changed)
        assert (
            "optim.matrices: 'muon' in the checkpoint, 'adamw' now; one optimizer cannot use the state of another"
            in message
        )
        assert "to allow" not in message
    (message,) = pools(1)(refusal_of, config(folder, optim={"momentum": 0.5}))
    assert "optim.momentum: 0.9 in the checkpoint, 0.5 now; to allow it: '--train.allow_changes" in message


def logged_settings(config: Any) -> list[str]:
    """What the check of a run's settings logs."""
    from relora_mora.train.begin import check

    with mock.patch.object(check, "log") as log:
        train(config, stop_after=0)
    return [call.args[0] % call.args[1:] for call in log.info.call_args_list]


@pytest.mark.more
def test_settings_that_the_optimizer_does_not_use_are_named(pools, config, tmp_path):
    (messages,) = pools(1)(logged_settings, config(tmp_path / "run", optim={"matrices": "adamw"}))
    assert messages == ["optim.matrices=adamw does not use optim.momentum"]
    (messages,) = pools(1)(logged_settings, config(tmp_path / "muon", method={"name": "full"}))
    assert "method full does not use optim.restart_warmup_steps" in messages
    assert not any("optim.matrices" in message for message in messages)
