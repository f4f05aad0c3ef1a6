"""The resident form: ``W + delta`` is built once per step, and whatever changes a weight lets go of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.distributed


def builds_and_bits(stage: int, bf16: bool) -> dict[str, Any]:
    """Steps, evaluations and a merge in both forms; what each built, and all weights after them."""
    from unittest import mock

    from relora_mora.methods.mora import MoRALinear
    from tests.tools.tiny import batch, build_rig, tiny_config, whole_weights

    seen: dict[str, Any] = {}
    for form in ("merged", "resident"):
        rig = build_rig(tiny_config(1, train={"zero_stage": stage}, method={"form": form}), bf16=bf16)
        numbers: list[float] = []
        kept: list[int] = []
        with mock.patch.object(MoRALinear, "build_merged", autospec=True, side_effect=MoRALinear.build_merged) as build:
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


@pytest.mark.parametrize("stage,bf16", [(0, True), (0, False), (1, True), (1, False), (2, True), (2, False)])
def test_it_trains_as_the_merged_form_bit_for_bit_and_builds_once_a_step(pools, stage, bf16):
    [seen] = pools(1)(builds_and_bits, stage, bf16)
    torch.testing.assert_close(
        seen["resident", "numbers"], seen["merged", "numbers"], rtol=0, atol=0, equal_nan=True
    )  # a step was poisoned
    merged, resident = seen["merged", "bits"], seen["resident", "bits"]
    assert all(torch.equal(merged[name], resident[name]) for name in merged)
    assert seen["resident", "builds"] == 6 * 14 and seen["merged", "builds"] == 0  # 4 micro-batches, evaluations
    assert seen["resident", "kept"] == [0] * 6


def after_changes(stage: int) -> dict[str, tuple[int, bool]]:
    """For each way to change a weight: how many layers still keep ``W + delta``, and whether the next is right."""
    from relora_mora.operators import Draw
    from tests.tools.tiny import batch, build_rig, tiny_config

    rig = build_rig(tiny_config(1, train={"zero_stage": stage}, method={"form": "resident"}))
    name, layer = next(iter(rig.merger.layers.items()))

    def forward() -> None:
        with torch.no_grad():
            rig.engine(*(tensor.to(rig.engine.device) for tensor in batch(1)))
        assert all(layer.merged_weight is not None for layer in rig.merger.layers.values())

    changes = {
        "masters": lambda: rig.engine.write_masters({f"{name}.mora_M": torch.ones(layer.mora_M.shape)}),
        "base": lambda: rig.engine.write_weight(f"{name}.weight", torch.ones(layer.weight.shape), 0),
        "operator": lambda: rig.merger.set_operator(2, Draw()),
    }
    seen = {}
    for what, change in changes.items():
        forward()
        change()
        left = sum(layer.merged_weight is not None for layer in rig.merger.layers.values())
        forward()
        seen[what] = left, torch.equal(layer.merged_weight, layer.build_merged())
    return seen


@pytest.mark.parametrize("stage", [0, 2])
def test_whatever_changes_a_weight_lets_go_of_it(pools, stage):
    [seen] = pools(1)(after_changes, stage)
    assert seen == dict.fromkeys(("masters", "base", "operator"), (0, True))
