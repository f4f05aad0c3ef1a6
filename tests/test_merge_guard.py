"""A merge that cannot be right does not begin: nothing is written to the base, on any rank."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.distributed
MERGE_AT = 4


def spoiled_merge(world_size: int, stage: int) -> str:
    from relora_mora.merging import MergeError
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}))
    rig.step(1)
    before = {name: weight.clone() for name, weight in rig.base.weights.items()}
    if rig.engine.rank == 0:
        shard = next(shard for shard in rig.engine.fragments if shard.name.endswith("mora_M"))
        with torch.no_grad():
            shard.of(shard.flat)[0] = float("inf")
    with pytest.raises(MergeError) as caught:
        rig.merge(MERGE_AT)
    assert all(torch.equal(before[name], weight) for name, weight in rig.base.weights.items())
    return str(caught.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_delta_that_is_not_finite_is_never_merged(pools, stage):
    messages = pools(2)(spoiled_merge, 2, stage)
    assert all("not finite" in message and "nothing was merged" in message for message in messages)


def merge_with_a_part_missing(world_size: int, stage: int, what: str) -> str:
    from relora_mora.merging import MergeError
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}))
    rig.step(1)
    before = {name: weight.clone() for name, weight in rig.base.weights.items()}
    if what == "layer":
        del rig.merger.layers[next(iter(rig.merger.layers))]
    elif rig.engine.rank == 1:
        rig.engine.fragments.remove(next(shard for shard in rig.engine.fragments if shard.name.endswith("mora_M")))
    with pytest.raises(MergeError) as caught:
        rig.merge(MERGE_AT)
    assert all(torch.equal(before[name], weight) for name, weight in rig.base.weights.items())
    return str(caught.value)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("what", ["layer", "shard of one rank"])
def test_a_merge_that_would_not_reach_everything_does_not_begin(pools, stage, what):
    messages = pools(2)(merge_with_a_part_missing, 2, stage, what)
    assert messages[0] == messages[1] and "nothing was merged" in messages[0]
    assert ("13 layers to merge, expected 14" in messages[0]) == (what == "layer")
