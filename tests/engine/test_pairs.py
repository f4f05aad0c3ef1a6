"""LoRA-Muon on every ZeRO stage, compared with a plain torch loop that has its formula in float64."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.schema import Config
from relora_mora.optim.muon import Muon
from tests.engine.reference import Reference, distance, losses_of, matrix_config, orthogonal, reference_of, small_llama
from tests.tools.grids import rest

pytestmark = pytest.mark.distributed


def _settings(world_size: int, stage: int, method: str, zero: dict[str, Any] | None = None, **optim: Any) -> Config:
    config = matrix_config(world_size, stage, method, zero, matrices="lora_muon", **optim)
    changed = config.method.model_copy(update={"lora_alpha": 10.0})  # of rank 5
    return config.model_copy(update={"method": changed})


class PairReference(Reference):
    """Steps A and B of a layer when A's turn comes."""

    @torch.no_grad()
    def _step_matrix(self, name: str, rate: float, decay: float) -> None:
        layer_name, _, key = name.rpartition(".")
        if key == "weight":  # of a linear without an adapter
            super()._step_matrix(name, rate, decay)
        if key != "lora_A":
            return
        A, B = (self.parameters[f"{layer_name}.lora_{which}"] for which in "AB")
        scale = dict(adapter_layers(self.lm))[layer_name].scale
        steps = [self._average(f"{layer_name}.lora_{which}") for which in "AB"]
        half = 0.1 * math.sqrt(max(A.shape[1], B.shape[0]))
        gram = A.double() @ A.double().mT
        root_A = _inverse_root(gram)
        root_B = _inverse_root(scale**2 * B.double().mT @ B.double() + (rate * half) ** 2 * torch.linalg.inv(gram))
        update_A = half * root_B @ orthogonal(root_B @ steps[0].double())
        update_B = half / scale * orthogonal(steps[1].double() @ root_A) @ root_A
        kept = math.sqrt(1 - rate * decay)
        for value, update in ((A, update_A), (B, update_B)):
            value *= kept
            value -= (rate / kept * update).float()


def _inverse_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.mT


def _reference(method: str, **optim: Any) -> tuple[PairReference, list[float]]:
    return reference_of(PairReference, _settings(1, 0, method, **optim))


def trained(world_size: int, stage: int, method: str, bf16: bool = False, **settings: Any) -> dict[str, Any]:
    """Losses, and at the end of the run the masters and the momentum of the adapters."""
    from tests.tools.tiny import build_rig

    rig = build_rig(_settings(world_size, stage, method, **settings), bf16=bf16, llama=small_llama())
    losses = losses_of(rig, rig.config.method.merges)
    [cut_matrices] = rig.engine.optimizer.matrices.values()
    return {
        "losses": losses,
        "masters": {name: rig.gather(name) for name in rig.engine.moments},
        "momentum": {name: rig.gather(name, "momentum") for name in rig.engine.moments if "lora" in name},
        "cut": any(exchange.is_needed for exchange in cut_matrices._exchanges.values()),
        "owned": set(cut_matrices.owned),
    }


CASES = [(2, "relora", 0), (2, "lora", 1), (2, "relora", 2), (2, "relora", 3), (1, "relora", 3)]
CASES += rest((2, "relora", 1), (2, "lora", 0), (2, "lora", 2), (2, "lora", 3))
CASES += rest((1, "relora", 0), (1, "relora", 1), (1, "relora", 2))


@pytest.mark.parametrize("world,method,stage", CASES)
def test_every_stage_trains_as_plain_torch_does(pools, world, method, stage):
    """With gradients of four micro-batches, momentum, weight decay, and a merge of relora."""
    reference, losses = _reference(method)
    start = {name: p.detach() for name, p in PairReference(reference.config).lm.named_parameters()}
    masters = {name: p.detach() for name, p in reference.parameters.items()}
    owners = []
    for found in pools(world)(trained, world, stage, method):
        assert found["losses"] == pytest.approx(losses, rel=2e-6)
        assert distance(found["masters"], masters, start) < 3e-4
        assert distance(found["momentum"], reference.momentum, {}) < 2e-4
        assert found["cut"] == (world > 1 and stage > 0)
        owners += found["owned"]
        assert {name.replace("lora_A", "lora_B") for name in found["owned"]} <= found["owned"]
    assert len(owners) == len(reference.momentum) * (world if stage == 0 else 1)


@pytest.mark.parametrize("stage", [3, *rest((0,), (1,), (2,))])
def test_without_nesterov(pools, stage):
    losses = _reference("relora", nesterov=False)[1]
    assert losses != pytest.approx(_reference("relora")[1], rel=2e-6)
    [found] = pools(1)(trained, 1, stage, "relora", nesterov=False)
    assert found["losses"] == pytest.approx(losses, rel=2e-6)


@pytest.mark.parametrize("stage,zero", [(1, {"round_robin_gradients": True}), (3, {"reduce_bucket_size": 1000})])
def test_with_deepspeeds_own_settings(pools, stage, zero):
    for found in pools(2)(trained, 2, stage, "relora", zero=zero):
        assert found["cut"]
        assert found["losses"] == pytest.approx(_reference("relora")[1], rel=2e-6)


@pytest.mark.parametrize("stage", [2, 3, *rest((0,), (1,))])
def test_in_bf16_pairs_train_as_in_plain_torch_up_to_rounding(pools, ranks, stage):
    losses = _reference("relora")[1]
    for found in pools(ranks)(trained, ranks, stage, "relora", bf16=True):
        assert found["losses"] == pytest.approx(losses, rel=1e-3)


def refused(world_size: int, stage: int, size: int) -> str:
    with pytest.raises(ValueError) as raised:
        trained(world_size, stage, "lora", zero={"sub_group_size": size})
    return str(raised.value)


def test_subgroups_that_separate_a_pair_are_refused(pools):
    """ZeRO-3 steps one subgroup after the other."""
    [message] = pools(1)(refused, 1, 3, 200)
    start = r"train\.deepspeed: zero_optimization\.sub_group_size separates (model\S+)\.lora_A and \1\.lora_B, "
    assert re.match(start + "which this optim.matrices updates together; raise it to more than", message)


def reset(world_size: int, stage: int, mode: str) -> tuple[dict[str, float], float]:
    """The share of a momentum's elements that a merge keeps, for both matrices, and how far the next step goes.

    That is the largest spectral norm of a product's change, in multiples of Muon's step.
    """
    from relora_mora.optim.groups import group_rates
    from tests.tools.tiny import build_rig

    config = _settings(world_size, stage, "relora", weight_decay=0.0)
    method = config.method.model_copy(update={"reset": mode, "reset_ratio": 0.75})
    rig = build_rig(config.model_copy(update={"method": method}), llama=small_llama())
    for step in range(1, 5):
        rig.step(step)
    pairs = rig.merger.parameters
    rig.merge(4)
    kept = {
        which: max(float((rig.gather(names[index], "momentum") != 0).double().mean()) for names in pairs.values())
        for index, which in enumerate("AB")
    }
    rig.step(5)
    rate = group_rates(rig.schedule, rig.groups, 5)[0]
    far = []
    for layer, names in pairs.items():
        delta = rig.merger.layers[layer].delta_of(*map(rig.gather, names))
        far.append(float(torch.linalg.matrix_norm(delta, ord=2)) / (rate * 0.2 * math.sqrt(max(delta.shape))))
    return kept, max(far)


@pytest.mark.parametrize("mode,kept", [("full", 0.0), ("magnitude", 0.25), ("random", 0.25), ("none", 1.0)])
def test_a_step_after_any_reset_is_bounded(pools, ranks, mode, kept):
    """B is zero again then, but A may still have a momentum. Both parts together and the second order: 1.5 x 1.2^2."""
    for shares, far in pools(ranks)(reset, ranks, 2, mode):
        assert shares == pytest.approx({"A": kept, "B": kept}, abs=0.08)
        assert 0.3 < far < 1.5 * 1.2**2


def not_all_targets() -> dict[str, str]:
    """The rule of every matrix that steps by one."""
    from tests.tools.tiny import build_rig

    config = _settings(1, 0, "lora", weight_decay=0.0)
    method = config.method.model_copy(update={"target_modules": ["q_proj"], "train_linears": True})
    rig = build_rig(config.model_copy(update={"method": method}), llama=small_llama())
    rules = {name: type(rule).__name__ for rule, cut in rig.engine.optimizer.matrices.items() for name in cut.owned}
    before = {name: rig.gather(name) for name in rules}
    rig.step(1)
    assert all(torch.equal(rig.gather(name), value) == ("lora_A" in name) for name, value in before.items())
    return rules


def test_linears_without_an_adapter_step_by_muon(pools):
    [rules] = pools(1)(not_all_targets)
    assert rules == {name: "LoRAMuon" if "lora" in name else Muon.__name__ for name in rules}
    assert sum("lora" in name for name in rules) == 2 * 3
    assert len(rules) == 2 * 3 + 6 * 3
