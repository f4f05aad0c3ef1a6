"""Weight decay of matrices with a rule, and cautious weight decay (arXiv 2510.12402)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relora_mora.config.optim import OptimConfig
from relora_mora.optim.groups import MatrixAdamW, ParameterGroup, build_optimizer
from relora_mora.optim.rules import Unit, new_state

RATE, DECAY, STEPS = 0.25, 0.5, 4  # their product and one less it are exact


class Whole:
    """Every flat tensor is one matrix."""

    def replace(self, gradients: dict[Tensor, Tensor], update: Any) -> None:
        for gradient in gradients.values():
            gradient.copy_(update([gradient[None].clone()], [Unit(("weight",))])[0][0])


def _trained(matrices: str, weight_decay: float, cautious_decay: bool) -> tuple[list[Tensor], list[Tensor]]:
    """A linear's weight and its changes by the optimizer, before the first step and after each one."""
    model = nn.Linear(9, 6, bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.weight.copy_(torch.randn(6, 9, generator=generator))
        model.weight[0] = 0
    optim = OptimConfig(matrices=matrices, weight_decay=weight_decay, cautious_decay=cautious_decay)
    moments = optim.of_group("linears").moments
    group = ParameterGroup("linears", ("weight",), RATE, weight_decay, rewarms=True, moments=moments)
    optimizer = build_optimizer(model, [group], optim)
    if isinstance(optimizer, MatrixAdamW):
        optimizer.matrices = {rule: Whole() for rule in optimizer.rules.values()}
        optimizer.states = {"weight": new_state(0, {})}
    optimizer.param_groups[0]["lr"] = RATE
    weights, updates = [model.weight.detach().clone()], []
    for _ in range(STEPS):
        model.weight.grad = torch.randn(6, 9, generator=generator)
        optimizer.step()
        weights.append(model.weight.detach().clone())
        updates.append(model.weight.grad.clone())
    return weights, updates


def test_only_elements_decay_that_their_step_brings_closer_to_zero():
    weights, updates = _trained("muon", DECAY, cautious_decay=True)
    shares = []
    for before, after, update in zip(weights, weights[1:], updates, strict=False):
        agrees = update * before >= 0
        expected = before - RATE * update - RATE * DECAY * before * agrees
        assert torch.allclose(after, expected, rtol=0, atol=1e-6)
        shares.append(float(agrees.double().mean()))
    assert min(shares) > 0.2
    assert max(shares) < 0.8


def test_an_element_decays_as_without_caution_or_as_without_decay():
    """Bit for bit, in the first step, whose update does not depend on the weights."""
    cautious, plain, none = (
        _trained("muon", decay, caution)[0][1] for decay, caution in ((DECAY, True), (DECAY, False), (0.0, False))
    )
    as_plain, as_none = cautious == plain, cautious == none
    assert (as_plain | as_none).all()
    assert (~as_plain).any()
    assert (~as_none).any()


@pytest.mark.parametrize("matrices,decay", [("adamw", DECAY), ("muon", 0.0)])
def test_it_does_nothing_with_adamw_or_without_decay(matrices, decay):
    with_it, without = (_trained(matrices, decay, caution)[0] for caution in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert not torch.equal(with_it[0], with_it[-1])
