"""The contract of a rule in whole runs: they move between ranks and stages, and keep their rule.

Two rules of one's own, Muon and 8-bit AdamW.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.tools.grids import rest
from tests.tools.rules import matrices_settings
from tests.tools.runs import checkpoint_at, logged_values, refusal_of, train

pytestmark = pytest.mark.distributed

RULE = {"rank": 4, "every": 3}  # the projection is renewed in the steps 1, 4 and 7, or 1, 4, 5 and 8


@pytest.fixture
def config(runs):
    """The settings of a run of full rank in a folder."""

    def make(folder: Path, world_size: int = 1, **sections: dict[str, Any]) -> Any:
        sections = {"method": {"name": "full"}, **sections}
        return runs.config(folder, world_size, **sections)

    return make


MOVES = [(1, 0, 2, 3, "galore", "adamw8bit")]
MOVES += rest((2, 1, 4, 2, "galore", "adamw"), (4, 3, 1, 0, "muon", "adamw"))


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
def test_a_rule_with_states_of_other_shapes_is_refused(pools, config, tmp_path):
    """Even if the change of its settings is allowed."""
    folder = tmp_path / "run"
    pools(1)(train, config(folder, optim=matrices_settings("galore", **RULE)), stop_after=2)
    given = {"allow_changes": ["optim.rule"], "resume": str(checkpoint_at(folder, 1))}
    other_rank = {"optim": matrices_settings("galore", rank=5, every=3), "train": given}
    before = sorted((folder / "checkpoints").iterdir())
    (message,) = pools(1)(refusal_of, config(folder, **other_rank))
    assert "other shapes or states" in message
    assert sorted((folder / "checkpoints").iterdir()) == before
