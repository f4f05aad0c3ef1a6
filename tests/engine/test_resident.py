"""The resident form builds ``W + delta`` once per step. That it trains as the others do is shown by tests/grid."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist

from tests.tools.grids import rest


def builds(stage: int, bf16: bool, method: dict[str, Any]) -> tuple[int, set[int]]:
    """How often six steps with a merge, a step that is skipped and evaluations build a weight, and how many they keep.

    Each step has four micro-batches, and the model 14 layers.
    """
    from relora_mora.adapters.inject import layer_class
    from tests.tools.tiny import batch, build_rig, tiny_config

    config = tiny_config(dist.get_world_size(), train={"zero_stage": stage}, method={**method, "form": "resident"})
    rig = build_rig(config, bf16=bf16)
    layer = layer_class(config.method)
    kept = set()
    with mock.patch.object(layer, "build_merged", autospec=True, side_effect=layer.build_merged) as build:
        for step in range(1, 7):
            rig.step(step, poison=step == 3)
            if rig.schedule.merge_after(step):
                rig.merge(step)
            kept.add(sum(each.merged_weight is not None for each in rig.merger.layers.values()))
        with torch.no_grad():
            for _ in range(2):
                rig.engine(*(tensor.to(rig.engine.device) for tensor in batch(step)))
    return build.call_count, kept


@pytest.mark.distributed
@pytest.mark.parametrize("stage,ranks,bf16,method", [(2, 2, True, {"name": "relora"}), *rest((0, 1, False, {}))])
def test_a_step_builds_each_weight_once_and_keeps_none_after_it(pools, stage, ranks, bf16, method):
    assert pools(ranks)(builds, stage, bf16, method) == [(7 * 14, {0})] * ranks
