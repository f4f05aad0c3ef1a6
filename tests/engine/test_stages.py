"""All ZeRO stages compute the same: around a merge, with clipping, in bf16, with tied and frozen embeddings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.tools.grids import STAGES, rest

pytestmark = pytest.mark.distributed


def _seven_steps(rig: Any, values: int = 1) -> list[float]:
    """Losses of seven steps with a merge after the fourth; with two ``values``, the gradient norms as well."""
    out: list[float] = []
    for step in range(1, 8):
        out.extend(rig.step(step)[:values])
        if rig.schedule.merge_after(step):
            rig.merge(step)
    return out


def losses(world_size: int, stage: int, bf16: bool = False, clip: float = 1.0) -> list[float]:
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}, optim={"clip": clip}), bf16=bf16)
    return _seven_steps(rig, values=2 if clip < 1 else 1)


@pytest.mark.parametrize("world", [2, *rest((1,))])
def test_stages_agree_around_a_merge(pools, world):
    plain = pools(world)(losses, world, 0)[0]
    for stage in (1, 2, 3):
        assert pools(world)(losses, world, stage)[0] == pytest.approx(plain, rel=1e-6), stage


def other_settings(world_size: int, stage: int, settings: dict[str, Any]) -> list[float]:
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage, "deepspeed": {"zero_optimization": settings}}))
    return _seven_steps(rig)


@pytest.mark.parametrize(
    "stage,settings",
    [
        (1, {"round_robin_gradients": True}),
        *rest((2, {"round_robin_gradients": True})),
        (2, {"overlap_comm": True, "reduce_bucket_size": 1000}),
        (2, {"contiguous_gradients": False}),
        (3, {"sub_group_size": 1000, "reduce_bucket_size": 1000}),
        (3, {"stage3_prefetch_bucket_size": 0}),
        (3, {"stage3_max_live_parameters": 1000}),
    ],
)
def test_deepspeeds_own_settings_change_nothing(pools, stage, settings):
    assert pools(2)(other_settings, 2, stage, settings)[0] == pytest.approx(pools(2)(losses, 2, 0)[0], rel=1e-6)


def tied_or_frozen(world_size: int, stage: int, tied: bool) -> list[float]:
    from tests.tools.tiny import build_rig, tiny_config, tiny_llama

    method = {} if tied else {"train_embeddings": False, "train_norms": False}
    rig = build_rig(
        tiny_config(world_size, train={"zero_stage": stage}, method=method), llama=tiny_llama(tie_word_embeddings=tied)
    )
    assert (sum("embed" in name for names in rig.engine.members for name in names) == 1) == tied
    return _seven_steps(rig)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_frozen_embeddings_on_every_stage(pools, tied):
    plain = pools(2)(tied_or_frozen, 2, 0, tied)[0]
    for stage in (1, 2, 3):
        assert pools(2)(tied_or_frozen, 2, stage, tied)[0] == pytest.approx(plain, rel=1e-6), stage


def test_stages_clip_the_same_way(pools):
    free = pools(2)(losses, 2, 0)[0]
    plain = pools(2)(losses, 2, 0, clip=0.05)[0]
    # the norms are measured before clipping, and clipping had an effect
    assert min(plain[1::2]) > 0.05
    assert abs(plain[2] - free[1]) > 0
    for stage in (1, 2, 3):
        assert pools(2)(losses, 2, stage, clip=0.05)[0] == pytest.approx(plain, rel=2e-5), stage


def test_stages_agree_in_bf16(pools, ranks):
    plain = pools(ranks)(losses, ranks, 0, bf16=True)[0]
    for stage in (1, 2, 3):
        assert pools(ranks)(losses, ranks, stage, bf16=True)[0] == pytest.approx(plain, rel=1e-3), stage


def poisoned(world_size: int, stage: int, bf16: bool, matrices: str) -> dict[str, Any]:
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}, optim={"matrices": matrices}), bf16=bf16)
    rig.step(1)
    names = [name for group in rig.engine.members for name in group]
    places = [(name, key) for name in names for key in (None, *rig.engine.moments[name])]
    before = [rig.gather(*place) for place in places]
    counts = rig.engine.group_steps()
    logits = rig.logits()
    _, norm, applied = rig.step(2, poison=rig.engine.rank == world_size - 1)
    same = all(torch.equal(value, rig.gather(*place)) for place, value in zip(places, before, strict=True))
    same = same and rig.engine.group_steps() == counts and torch.equal(rig.logits(), logits)
    loss, _, after = rig.step(3)
    return {"norm": norm, "applied": applied, "same": same, "next_loss": loss, "next_applied": after}


POISONED = [(stage, *((False, "adamw"), (True, "muon"))[stage % 2]) for stage in STAGES]
POISONED += rest(*((stage, *((True, "muon"), (False, "adamw"))[stage % 2]) for stage in STAGES))
POISONED += rest(*((stage, True, "adamw") for stage in STAGES))


@pytest.mark.parametrize("stage,bf16,matrices", POISONED)
def test_a_nan_on_one_rank_stops_the_step_on_all(pools, ranks, stage, bf16, matrices):
    for seen in pools(ranks)(poisoned, ranks, stage, bf16, matrices):
        assert not math.isfinite(seen["norm"])
        assert not seen["applied"]
        assert seen["same"]
        assert seen["next_applied"]
        assert math.isfinite(seen["next_loss"])


def frozen_masters(stage: int) -> list[str]:
    """The engine's messages if it is asked for the masters of frozen weights."""
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(1, train={"zero_stage": stage}))
    messages = []
    for name in rig.base.owner:
        with pytest.raises(AssertionError) as raised:
            rig.engine.gather(name)
        messages.append(str(raised.value))
    return messages


@pytest.mark.parametrize("stage", STAGES)
def test_a_frozen_weight_has_no_master_to_gather(pools, stage):
    """Zeros would look like a master."""
    [messages] = pools(1)(frozen_masters, stage)
    assert messages
    assert all("is frozen" in message for message in messages)
