"""Merge, reset, switch and re-warm on every ZeRO stage, in both precisions, with one and two processes.

That other resets are what the settings say is shown by tests/grid and tests/library.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tools.grids import rest

MERGE_AT = 4


def _frozen(rig: Any) -> dict[str, Tensor]:
    from tests.tools.tiny import whole_weights

    return whole_weights(rig.engine, rig.base.owner)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _adapters(rig: Any) -> dict[str, Tensor]:
    return {name: rig.gather(name) for names in rig.merger.parameters.values() for name in names}


def _plain_logits(rig: Any) -> Tensor:
    """Logits of the frozen weights only, without the adapters."""
    layers = list(rig.merger.layers.values())
    for layer in layers:
        layer.forward = lambda x, layer=layer: F.linear(x, layer.weight)
    try:
        return rig.logits()
    finally:
        for layer in layers:
            del layer.forward


def _state(rig: Any, *groups: str) -> dict[str, Tensor]:
    flats = rig.engine.flats({name for group in groups for name in rig.engine.groups[group]})
    states = [rig.engine.state_of(flat) for flat in flats]
    return {f"{index} {key}": value.clone().cpu() for index, each in enumerate(states) for key, value in each.items()}


def one_merge(world_size: int, stage: int, bf16: bool, method: str, threshold: int | None) -> Any:
    """One merge between steps 4 and 5; returns losses and the base, which are the same on all ranks."""
    from tests.tools.tiny import build_rig, tiny_config

    extra = {} if threshold is None else {"zero_optimization": {"stage3_param_persistence_threshold": threshold}}
    train = {"zero_stage": stage, "deepspeed": extra}
    rig = build_rig(tiny_config(world_size, train=train, method={"name": method}), bf16=bf16)
    assert all(torch.equal(rig.gather(name), rig.initial[name]) for name in rig.engine.moments)
    assert set(rig.engine.group_steps().values()) <= {0, -1}  # -1: of a group that this rank has no part of
    start = _frozen(rig)
    losses = [rig.step(step)[0] for step in range(1, MERGE_AT + 1)]
    assert _same(start, _frozen(rig))
    assert all(value.any() for value in _adapters(rig).values())
    logits, others = rig.logits(), _state(rig, "embeddings", "norms")
    record = rig.merge(MERGE_AT)
    assert record.layers == 14
    assert (record.operator_before, record.operator_after) == ((1, 2) if method == "remora" else (None, None))
    assert len(record.delta_norm) == len(record.effective_rank) == 7
    assert all(value > 0 for value in record.delta_norm.values())
    assert all(value >= 1 for value in record.effective_rank.values())
    assert _same(others, _state(rig, "embeddings", "norms"))
    assert not any(value.any() for value in _state(rig, "adapters").values())
    merged = rig.logits()
    # bf16: one rounding of W + delta before, another of the base after
    assert (merged - logits).abs().max() <= (0.03 * logits.abs().max() if bf16 else 1e-5)
    assert torch.equal(merged, _plain_logits(rig))
    base, fresh = _frozen(rig), _adapters(rig)
    assert not any(torch.equal(base[f"{name}.weight"], start[f"{name}.weight"]) for name in rig.merger.layers)
    rig.step(5, scale=0.0)
    assert _same(fresh, _adapters(rig))
    assert torch.equal(rig.logits(), _plain_logits(rig))
    rig.engine.clear_state(fresh.keys())
    losses.append(rig.step(6)[0])
    moved = torch.stack([(value - fresh[name]).abs().max() for name, value in _adapters(rig).items()]).max()
    assert 0 < moved <= rig.groups[0].peak_lr * rig.schedule.rate(6) * (1 + 1e-5)  # NaN is neither
    losses.append(rig.step(7)[0])
    assert _same(base, _frozen(rig))
    assert all(torch.equal(weight.to(base[name].dtype), base[name]) for name, weight in rig.base.weights.items())
    losses.append(rig.step(8)[0])
    rig.merge(8)  # right after a step, which leaves small parameters gathered at stage 3
    assert torch.equal(rig.logits(), _plain_logits(rig))
    return losses, base


CASES = [
    (2, 0, True, "remora", None),
    (2, 3, False, "remora", 0),
    (1, 3, True, "relora", None),
    *rest((2, 1, False, "remora", None), (2, 2, True, "remora", None), (2, 3, True, "remora", None)),
    *rest((2, 2, True, "relora", None), (1, 1, True, "remora", None)),
]


@pytest.mark.distributed
@pytest.mark.parametrize("world,stage,bf16,method,threshold", CASES)
def test_a_merge_changes_only_what_it_should(pools, world, stage, bf16, method, threshold):
    (losses, base), *others = pools(world)(one_merge, world, stage, bf16, method, threshold)
    for other_losses, other_base in others:
        assert losses == other_losses
        assert _same(base, other_base)


def hundred_merges(world_size: int, stage: int, bf16: bool, base: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """100 merges of random adapters are the float64 sum of the same deltas; returns the base, and what a rank owns."""
    from tests.tools.tiny import build_rig, tiny_config

    method = {"operators": [1, 2, 3, 4], "merge_every": 3, "base": base, "base_products": True}
    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}, method=method), bf16=bf16)
    exact = {name: rig.initial[name].double() for name in rig.base.owned}
    ranked = []
    for merge in range(1, 101):
        generator = torch.Generator().manual_seed(merge)
        values = {name: torch.randn(value.shape, generator=generator) * 1e-3 for name, value in _adapters(rig).items()}
        rig.engine.write_masters(values)
        for name, layer in rig.merger.layers.items():
            if f"{name}.weight" in exact:
                exact[f"{name}.weight"] += layer.delta_of(values[f"{name}.mora_M"].double())
        record = rig.merger.merge(3 * merge, merge, (1, 2, 3, 4)[merge % 4])
        ranked += [3 * merge] if record.effective_rank else []
    assert ranked == [3, 102, 201, 300], "the first merge, and one in each hundred steps"
    weights = _frozen(rig)
    largest = max(float(value.abs().max()) for value in exact.values())
    rounding = 0.0
    for name, value in exact.items():
        # 100 additions, each off by at most half a unit in the last place (2^-24); a bf16 base would be off by 2^-9
        assert (rig.base.weights[name].double() - value).abs().max() <= 100 * 2**-24 * largest
        assert (value - rig.initial[name].double()).abs().max() > 1e-3
        dense = rig.engine.layers[name].stored.dense(weights[name], torch.float32).double()
        rounding = max(rounding, float(((dense - value).abs() / value.abs().amax(1, True)).max()))
    if base == "int8":  # one rounding of the sum: half a step of a row's scale
        assert 0.9 * 0.5 / 127 < rounding < (1 + 1e-3) * 0.5 / 127
    return weights, rig.base.owned


@pytest.mark.more
@pytest.mark.distributed
@pytest.mark.parametrize(
    "stage,bf16,base", [(2, True, "int8"), *rest((3, False, None), (0, True, None), (1, True, None))]
)
def test_the_base_is_exact_after_a_hundred_merges(pools, ranks, stage, bf16, base):
    found = pools(ranks)(hundred_merges, ranks, stage, bf16, base)
    assert all(_same(found[0][0], weights) for weights, _ in found)
    assert sorted(name for _, owned in found for name in owned) == sorted(found[0][0])
