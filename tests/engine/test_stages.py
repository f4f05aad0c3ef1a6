"""A step that is not finite is skipped on all ranks, on every ZeRO stage."""

import math
from typing import Any

import pytest
import torch

from tests.tools.grids import STAGES, rest


def poisoned(world_size: int, stage: int, bf16: bool, matrices: str) -> dict[str, Any]:
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}, optim={"matrices": matrices}), bf16=bf16)
    rig.step(1)
    places = [(name, key) for name, moments in rig.engine.moments.items() for key in (None, *moments)]

    def state() -> tuple[list[torch.Tensor], dict[str, int]]:
        return [*(rig.gather(*place) for place in places), rig.logits()], rig.engine.group_steps()

    before, counts = state()
    _, norm, applied = rig.step(2, poison=rig.engine.rank == world_size - 1)
    after, counts_after = state()
    same = counts == counts_after and all(map(torch.equal, before, after))
    loss, _, next_applied = rig.step(3)
    return {"norm": norm, "applied": applied, "same": same, "next_loss": loss, "next_applied": next_applied}


POISONED = [(stage, *((False, "adamw"), (True, "muon"))[stage % 2]) for stage in STAGES]
POISONED += rest(*((stage, *((True, "muon"), (False, "adamw"))[stage % 2]) for stage in STAGES))


@pytest.mark.distributed
@pytest.mark.parametrize("stage,bf16,matrices", POISONED)
def test_a_nan_on_one_rank_stops_the_step_on_all(pools, ranks, stage, bf16, matrices):
    for seen in pools(ranks)(poisoned, ranks, stage, bf16, matrices):
        assert not math.isfinite(seen["norm"])
        assert math.isfinite(seen["next_loss"])
        assert (seen["applied"], seen["same"], seen["next_applied"]) == (False, True, True)
