"""A merge that cannot be right does not begin or ends the run, and its result is not saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.distributed
MERGE_AT = 4


def refused_merge(rig: Any) -> str:
    from relora_mora.engine.merging import MergeError

    with pytest.raises(MergeError) as caught:
        rig.merge(MERGE_AT)
    return str(caught.value)


def merge_of_an_infinite_adapter(world_size: int, stage: int) -> str:
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}))
    rig.step(1)
    before = {name: weight.clone() for name, weight in rig.base.weights.items()}
    if rig.engine.rank == 0:
        shard = next(shard for shard in rig.engine.fragments if shard.name.endswith("mora_M"))
        with torch.no_grad():
            shard.of(shard.flat)[0] = float("inf")
    message = refused_merge(rig)
    assert all(torch.equal(before[name], weight) for name, weight in rig.base.weights.items())
    return message


@pytest.mark.more
@pytest.mark.parametrize("stage", [2, 3])
def test_a_delta_that_is_not_finite_is_never_merged(pools, stage):
    messages = pools(2)(merge_of_an_infinite_adapter, 2, stage)
    assert messages[0] == messages[1]
    assert ".mora_M)" in messages[0]
    assert "not finite" in messages[0]
    assert "nothing was merged" in messages[0]


def merge_with_a_part_missing(world_size: int, stage: int) -> str:
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}))
    rig.step(1)
    before = {name: weight.clone() for name, weight in rig.base.weights.items()}
    if rig.engine.rank == 1:
        rig.engine.fragments.remove(next(shard for shard in rig.engine.fragments if shard.name.endswith("mora_M")))
    message = refused_merge(rig)
    assert all(torch.equal(before[name], weight) for name, weight in rig.base.weights.items())
    return message


@pytest.mark.more
@pytest.mark.parametrize("stage", [2, 3])
def test_a_merge_that_would_miss_something_does_not_begin(pools, stage):
    messages = pools(2)(merge_with_a_part_missing, 2, stage)
    assert messages[0] == messages[1]
    assert "nothing was merged" in messages[0]


def merge_of_large_products(world_size: int, stage: int) -> str:
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}, method={"name": "relora"}))
    names = [name for layer in rig.merger.parameters.values() for name in layer]
    rig.engine.write_masters({name: torch.full(rig.engine.shapes[name], 1e20) for name in names})
    return refused_merge(rig)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_product_of_finite_adapters_that_is_too_large_ends_the_run(pools, stage):
    first, second = pools(2)(merge_of_large_products, 2, stage)
    assert first == second
    assert "is too large for float32" in first
    assert "nothing of this merge was saved" in first


def merge_with_a_part_not_reset(world_size: int, stage: int) -> str:
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}))
    rig.step(1)
    scatter = rig.engine.scatter
    if rig.engine.rank == 1:
        rig.engine.scatter = lambda name, value, key=None: max(0, scatter(name, value, key) - 1)
    return refused_merge(rig)


@pytest.mark.more
@pytest.mark.parametrize("stage", [2, 3])
def test_a_merge_that_has_not_reset_everything_ends_the_run(pools, stage):
    first, second = pools(2)(merge_with_a_part_not_reset, 2, stage)
    assert first == second
    assert "the merge reset only " in first
    assert "nothing of it was saved" in first
