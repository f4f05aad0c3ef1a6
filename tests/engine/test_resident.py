"""The resident form: ``W + delta`` is built once per step, and every change of a weight drops it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed as dist

from tests.tools.grids import rest

pytestmark = pytest.mark.distributed


def builds_and_bits(stage: int, bf16: bool, method: dict[str, Any]) -> dict[str, Any]:
    """Runs steps, evaluations and a merge in both forms; returns what each built, and all weights afterwards."""
    from unittest import mock

    from relora_mora.adapters.inject import layer_class
    from tests.tools.tiny import batch, build_rig, tiny_config, whole_weights

    seen: dict[str, Any] = {}
    for form in ("merged", "resident"):
        settings = {"train": {"zero_stage": stage}, "method": {**method, "form": form}}
        config = tiny_config(dist.get_world_size(), **settings)
        rig = build_rig(config, bf16=bf16)
        numbers: list[float] = []
        kept: list[int] = []
        layer = layer_class(config.method)
        with mock.patch.object(layer, "build_merged", autospec=True, side_effect=layer.build_merged) as build:
            for step in range(1, 7):
                numbers += rig.step(step, poison=step == 3)[:2]
                if rig.schedule.merge_after(step):
                    rig.merge(step)
                kept.append(sum(layer.merged_weight is not None for layer in rig.merger.layers.values()))
                if step in (2, 4):
                    with torch.no_grad():
                        numbers.append(float(rig.engine(*(tensor.to(rig.engine.device) for tensor in batch(step)))))
            seen[form, "builds"] = build.call_count
        seen[form, "kept"] = kept
        seen[form, "bits"] = whole_weights(rig.engine, rig.engine.parameters)
        seen[form, "numbers"] = torch.tensor(numbers)
    return seen


REMORA = {"name": "remora"}
CASES: list[Any] = [(0, False, 1, REMORA), (2, True, 2, {"name": "mora", "operators": [6], "square_multiple": 2})]
CASES += rest((1, True, 1, REMORA), (2, True, 2, {"name": "relora"}))


@pytest.mark.more
@pytest.mark.parametrize("stage,bf16,ranks,method", CASES)
def test_resident_layers_train_like_the_merged_form_and_build_once_a_step(pools, stage, bf16, ranks, method):
    for seen in pools(ranks)(builds_and_bits, stage, bf16, method):
        torch.testing.assert_close(
            seen["resident", "numbers"], seen["merged", "numbers"], rtol=0, atol=0, equal_nan=True
        )  # NaN: one step has a poisoned gradient
        merged, resident = seen["merged", "bits"], seen["resident", "bits"]
        assert all(torch.equal(merged[name], resident[name]) for name in merged)
        assert seen["resident", "builds"] == 6 * 14
        assert seen["merged", "builds"] == 0  # 4 micro-batches, evaluations
        assert seen["resident", "kept"] == [0] * 6


def after_changes(stage: int) -> dict[str, tuple[int, bool]]:
    """For each way to change a weight: how many layers keep ``W + delta``, and whether the next one is right."""
    from tests.tools.tiny import batch, build_rig, tiny_config, whole_weights

    rig = build_rig(tiny_config(dist.get_world_size(), train={"zero_stage": stage}, method={"form": "resident"}))
    name, layer = next(iter(rig.merger.layers.items()))
    weight, square = f"{name}.weight", f"{name}.mora_M"
    shapes = rig.engine.shapes

    def forward() -> None:
        with torch.no_grad():
            rig.engine(*(tensor.to(rig.engine.device) for tensor in batch(1)))
        assert all(layer.merged_weight is not None for layer in rig.merger.layers.values())

    def is_right() -> bool:
        merged = layer.merged_weight.cpu()
        rig.engine.drop_merged()
        whole = whole_weights(rig.engine, [weight, square])
        return torch.equal(merged, layer.operator.add_delta(whole[weight], whole[square]))

    changes = {
        "masters": lambda: rig.engine.write_masters({square: torch.ones(shapes[square])}),
        "base": lambda: rig.engine.write_weight(weight, torch.ones(shapes[weight]), 0),
        "operator": lambda: rig.merger.set_operator(2),
    }
    seen = {}
    for what, change in changes.items():
        forward()
        change()
        left = sum(layer.merged_weight is not None for layer in rig.merger.layers.values())
        forward()
        seen[what] = left, is_right()
    forward()
    rig.engine.drop_merged()
    seen["nothing"] = 0, torch.equal(whole_weights(rig.engine, [weight])[weight], torch.ones(shapes[weight]))
    return seen


@pytest.mark.parametrize("stage,ranks", [(2, 2), *rest((0, 1))])
def test_every_change_of_a_weight_drops_the_resident_one(pools, stage, ranks):
    for seen in pools(ranks)(after_changes, stage):
        assert seen == dict.fromkeys(("masters", "base", "operator", "nothing"), (0, True))
