"""Merge, reset, switch and re-warm on every ZeRO stage, in both precisions, with one and two processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.tools.grids import rest
from tests.tools.tiny import whole_weights

pytestmark = pytest.mark.distributed

MERGE_AT = 4


def _bits(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _frozen_bits(rig: Any) -> dict[str, str]:
    return {name: _bits(weight) for name, weight in whole_weights(rig.engine, rig.base.owner).items()}


def _adapters(rig: Any) -> dict[str, torch.Tensor]:
    return {name: rig.gather(name) for names in rig.merger.parameters.values() for name in names}


def _largest(values: Iterable[torch.Tensor]) -> float:
    """The maximum, or NaN if any value is NaN, which Python's max would ignore."""
    return float(torch.stack(list(values)).max())


def _plain_logits(rig: Any) -> torch.Tensor:
    """Logits of the frozen weights only, without the adapters."""
    forwards = {layer: layer.forward for layer in rig.merger.layers.values()}
    for layer in forwards:
        layer.forward = lambda x, layer=layer: F.linear(x, layer.weight)
    try:
        return rig.logits()
    finally:
        for layer, forward in forwards.items():
            layer.forward = forward


def _state(rig: Any, group: str) -> list[dict[str, torch.Tensor]]:
    names = set(rig.engine.members[rig.engine.group_names.index(group)])
    states = [rig.engine.state_of(flat) for flat in rig.engine.flats(names)]
    return [{key: value.clone().cpu() for key, value in state.items()} for state in states]


def scenario(world_size: int, stage: int, bf16: bool, method: str, threshold: int | None) -> dict[str, Any]:
    """One merge between steps 4 and 5; returns everything that the test checks."""
    from tests.tools.tiny import build_rig, tiny_config

    extra = {} if threshold is None else {"zero_optimization": {"stage3_param_persistence_threshold": threshold}}
    rig = build_rig(
        tiny_config(world_size, train={"zero_stage": stage, "deepspeed": extra}, method={"name": method}), bf16=bf16
    )
    seen: dict[str, Any] = {"losses": []}
    seen["initial_masters_exact"] = all(
        torch.equal(rig.gather(name), rig.initial[name]) for names in rig.engine.members for name in names
    )
    start = _frozen_bits(rig)
    for step in range(1, MERGE_AT + 1):
        seen["losses"].append(rig.step(step)[0])
    before = _frozen_bits(rig)
    seen["frozen_before_merge_unchanged"] = before == start
    seen["moved"] = all(value.abs().sum() > 0 for value in _adapters(rig).values())
    logits = rig.logits()
    others = _state(rig, "embeddings") + _state(rig, "norms")
    record = rig.merge(MERGE_AT)
    seen["record"] = record
    seen["others_untouched"] = all(
        torch.equal(a[key], b[key])
        for a, b in zip(others, _state(rig, "embeddings") + _state(rig, "norms"), strict=True)
        for key in a
    )
    merged = rig.logits()
    seen["logits_differ"] = float((merged - logits).abs().max())
    seen["logits_scale"] = float(logits.abs().max())
    seen["adds_nothing"] = torch.equal(merged, _plain_logits(rig))
    after = _frozen_bits(rig)
    seen["all_merged"] = all(after[f"{name}.weight"] != before[f"{name}.weight"] for name in rig.merger.layers)
    seen["bits"] = after
    seen["state_is_zero"] = all(not value.any() for state in _state(rig, "adapters") for value in state.values())
    fresh = _adapters(rig)
    rig.step(5, scale=0.0)
    still = _adapters(rig)
    seen["zero_gradient_moves_nothing"] = all(torch.equal(fresh[name], still[name]) for name in fresh)
    seen["adds_nothing_after_zero_gradient"] = torch.equal(rig.logits(), _plain_logits(rig))
    rig.merger._reset_state(2, {})
    rate = rig.groups[0].peak_lr * rig.schedule.rate(6)
    seen["losses"].append(rig.step(6)[0])
    moved = _adapters(rig)
    seen["first_step_of_rate"] = _largest((moved[name] - still[name]).abs().max() for name in moved) / rate
    seen["losses"].append(rig.step(7)[0])
    seen["frozen_after_merge_unchanged"] = _frozen_bits(rig) == after
    weights = whole_weights(rig.engine, rig.base.owner)
    seen["base_rounds_to_weights"] = all(
        torch.equal(rig.base.weights[name].to(weights[name].dtype), weights[name]) for name in rig.base.owned
    )
    return seen


CASES = [
    (2, 0, True, "remora", None),
    (2, 3, False, "remora", 0),
    (1, 3, True, "relora", None),
    *rest((2, 1, False, "remora", None), (2, 2, True, "remora", None), (2, 3, True, "remora", None)),
    *rest((2, 2, True, "relora", None), (1, 1, True, "remora", None)),
]


@pytest.mark.parametrize("world,stage,bf16,method,threshold", CASES)
def test_a_merge_changes_only_what_it_should(pools, world, stage, bf16, method, threshold):
    ranks = pools(world)(scenario, world, stage, bf16, method, threshold)
    for seen in ranks:
        assert seen["initial_masters_exact"]
        assert seen["moved"]
        assert seen["frozen_before_merge_unchanged"]
        assert seen["frozen_after_merge_unchanged"]
        assert seen["all_merged"]
        assert seen["others_untouched"]
        assert seen["adds_nothing"]
        assert seen["adds_nothing_after_zero_gradient"]
        assert seen["zero_gradient_moves_nothing"]
        assert seen["state_is_zero"]
        assert seen["base_rounds_to_weights"]
        assert 0 < seen["first_step_of_rate"] <= 1 + 1e-5
        # bf16: one rounding of W + delta before, another of the base after
        assert seen["logits_differ"] <= (0.03 * seen["logits_scale"] if bf16 else 1e-5)
        record = seen["record"]
        assert record.layers == 14
        assert (record.operator_before, record.operator_after) == ((1, 2) if method == "remora" else (None, None))
        assert all(value > 0 for value in record.delta_norm.values())
        assert len(record.delta_norm) == 7
        assert all(value >= 1 for value in record.effective_rank.values())
        assert len(record.effective_rank) == 7
        assert seen["bits"] == ranks[0]["bits"]
        assert seen["losses"] == ranks[0]["losses"]


def reset_mode(world_size: int, stage: int, mode: str, matrices: str) -> dict[str, Any]:
    from tests.tools.tiny import build_rig, tiny_config

    method = {"reset": mode, "reset_ratio": 0.75}
    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}, method=method, optim={"matrices": matrices}))
    for step in range(1, MERGE_AT + 1):
        rig.step(step)
    names = [name for parameters in rig.merger.parameters.values() for name in parameters]
    first, *others = rig.engine.moments[names[0]]
    before = {name: rig.gather(name, first) for name in names}
    rig.merge(MERGE_AT)
    return {
        "before": before,
        "after": {name: rig.gather(name, first) for name in names},
        "masters": {name: float(rig.gather(name).abs().max()) for name in names},
        "pruned_alike": all(
            torch.equal(rig.gather(name, first) == 0, rig.gather(name, other) == 0)
            for name in names
            for other in others
        ),
        "steps": rig.engine.group_steps()["adapters"],
    }


RESET_CASES = [("full", "muon"), ("magnitude", "adamw"), ("random", "muon"), ("none", "adamw")]
RESET_CASES += rest(("full", "adamw"), ("magnitude", "muon"), ("random", "adamw"), ("none", "muon"))


@pytest.mark.parametrize("mode,matrices", RESET_CASES)
def test_reset_modes(pools, ranks, mode, matrices):
    seen = pools(ranks)(reset_mode, ranks, 2, mode, matrices)[0]
    assert all(value == 0 for value in seen["masters"].values())
    assert seen["pruned_alike"]
    assert seen["steps"] == (0 if mode == "full" or matrices != "adamw" else MERGE_AT)
    for name, before in seen["before"].items():
        after = seen["after"][name]
        kept = after != 0
        assert torch.equal(after[kept], before[kept])
        share = float(kept.double().mean())
        expected = {"full": 0.0, "magnitude": 0.25, "random": 0.25, "none": float((before != 0).double().mean())}[mode]
        assert share == pytest.approx(expected, abs=1 / before.numel() + (0.05 if mode == "random" else 0))
        if mode == "magnitude":
            assert before[kept].abs().min() >= before[~kept].abs().max()


def hundred_merges(world_size: int, bf16: bool, base: str | None) -> dict[str, Any]:
    """100 merges of random adapters, and the float64 sum of the same deltas for comparison."""
    from tests.tools.tiny import build_rig, tiny_config, whole_weights

    method = {"operators": [1, 2, 3, 4], "merge_every": 3, "base": base, "base_products": True}
    rig = build_rig(tiny_config(world_size, train={"zero_stage": 2}, method=method), bf16=bf16)
    ranked = []
    reference = {name: rig.initial[name].double() for name in rig.base.owned}
    for merge in range(1, 101):
        generator = torch.Generator().manual_seed(merge)
        values = {
            name: torch.randn(rig.engine.shapes[name], generator=generator) * 1e-3
            for names in rig.merger.parameters.values()
            for name in names
        }
        rig.engine.write_masters(values)
        for name, layer in rig.merger.layers.items():
            if f"{name}.weight" in reference:
                reference[f"{name}.weight"] += layer.delta_of(values[f"{name}.mora_M"].double())
        record = rig.merger.merge(3 * merge, merge, (1, 2, 3, 4)[merge % 4])
        ranked += [3 * merge] if record.effective_rank else []
    errors = {name: float((rig.base.weights[name].double() - reference[name]).abs().max()) for name in reference}
    moved = {name: float((reference[name] - rig.initial[name].double()).abs().max()) for name in reference}
    weights = whole_weights(rig.engine, rig.base.owner)
    dense = {name: rig.engine.layers[name].stored.dense(weights[name], torch.float32).double() for name in reference}
    return {
        "errors": errors,
        "rounding": max(
            float(((dense[n] - value).abs() / value.abs().amax(1, True)).max()) for n, value in reference.items()
        ),
        "moved": moved,
        "ranked": ranked,
        "largest": max(float(value.abs().max()) for value in reference.values()),
        "bits": _frozen_bits(rig),
    }


@pytest.mark.more
@pytest.mark.parametrize("bf16,base", [(True, "int8"), *rest((False, None), (True, None))])
def test_the_base_is_exact_after_a_hundred_merges(pools, ranks, bf16, base):
    found = pools(ranks)(hundred_merges, ranks, bf16, base)
    assert all(seen["bits"] == found[0]["bits"] for seen in found)
    owned = [name for seen in found for name in seen["errors"]]
    assert len(owned) == len(set(owned)) == 14
    for seen in found:
        # 100 additions, each off by at most half a unit in the last place (2^-24); a bf16 base would be off by 2^-9
        assert max(seen["errors"].values()) <= 100 * 2**-24 * seen["largest"]
        assert min(seen["moved"].values()) > 1e-3
        if base == "int8":  # one rounding of the sum: half a step of a row's scale
            assert 0.9 * 0.5 / 127 < seen["rounding"] < (1 + 1e-3) * 0.5 / 127
        assert seen["ranked"] == [3, 102, 201, 300], "the first merge, and one in each hundred steps"
