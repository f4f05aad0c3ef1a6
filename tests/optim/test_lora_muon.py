"""LoRA-Muon's arithmetic on pairs of matrices, compared with its formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from relora_mora.config.optim import OptimConfig
from relora_mora.optim import lora_muon
from relora_mora.optim.groups import MatrixAdamW
from relora_mora.optim.lora_muon import LoRAMuon
from relora_mora.optim.rules import Unit
from tests.tools.memory import PeakBytes

SHAPES = [(4, 20, 20), (3, 40, 12), (5, 8, 30), (1, 6, 9)]  # r, in, out
SCALES = [1.0, 0.25, 4.0]
Pair = tuple[Tensor, Tensor]


def _sign(matrix: Tensor) -> Tensor:
    """U V^T of U S V^T, without the directions of zeros."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left * (values > 1e-9 * values.max())) @ right


def _inverse_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.mT


def _expected(steps: Pair, pair: Pair, scale: float, rate: float) -> Pair:
    """The updates at a rate of 1, with symmetric roots and exact signs."""
    (step_A, step_B), (A, B) = (each.double() for each in steps), (each.double() for each in pair)
    half = 0.1 * math.sqrt(max(A.shape[1], B.shape[0]))
    gram = A @ A.mT
    root_A = _inverse_root(gram)
    root_B = _inverse_root(scale**2 * B.mT @ B + (rate * half) ** 2 * torch.linalg.inv(gram))
    return half * root_B @ _sign(root_B @ step_A), half / scale * _sign(step_B @ root_A) @ root_A


def _pair(rank: int, in_features: int, out_features: int, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, in_features, generator=generator), torch.randn(out_features, rank, generator=generator)


def _updates(steps: Pair, pair: Pair, scale: float = 1.0, rate: float = 1e-3) -> Pair:
    found = LoRAMuon(OptimConfig()).update_pairs(
        (steps[0][None], steps[1][None]), (pair[0][None], pair[1][None]), scale, rate
    )
    return found[0][0], found[1][0]


@pytest.fixture
def exact(monkeypatch):
    """Exact signs in place of Newton-Schulz iterations, whose singular values are 0.7 to 1.2."""
    monkeypatch.setattr(lora_muon, "orthogonalize", lambda x: torch.stack([_sign(each.double()) for each in x]).float())


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), ord=2))


@pytest.mark.parametrize("rate", [1e-4, 1.0])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_that_of_the_formula(exact, shape, scale, rate):
    """At a rate of 1, a step is as long as the product, so that damping matters."""
    pair, steps = _pair(*shape), _pair(*shape, seed=1)
    for found, expected in zip(_updates(steps, pair, scale, rate), _expected(steps, pair, scale, rate), strict=True):
        assert torch.linalg.vector_norm(found - expected) < 1e-3 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_changes_only_the_singular_values_of_a_step(shape):
    pair, steps = _pair(*shape), _pair(*shape, seed=1)
    root = _inverse_root(pair[0].double() @ pair[0].double().mT)
    found, expected = (
        each[1].double() @ torch.linalg.inv(root) for each in (_updates(steps, pair), _expected(steps, pair, 1.0, 1e-3))
    )
    half = 0.1 * math.sqrt(max(shape[1:]))
    left, _, right = torch.linalg.svd(expected / half, full_matrices=False)
    rotated = left.mT @ (found / half) @ right.mT
    assert 0.6 < torch.linalg.svdvals(rotated).min() <= torch.linalg.svdvals(rotated).max() < 1.3


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_steps_by_the_spectral_norm_of_muons_step(exact, shape, scale):
    """Each of its two parts by half of it, so both together by no more, and by most of it if they agree."""
    (A, B), steps = _pair(*shape), _pair(*shape, seed=1)
    update_A, update_B = _updates(steps, (A, B), scale, rate=1e-4)
    whole = 0.2 * math.sqrt(max(shape[1:]))
    assert _norm(scale * update_B @ A) == pytest.approx(whole / 2, rel=1e-3)
    assert _norm(scale * B @ update_A) == pytest.approx(whole / 2, rel=1e-3)
    assert whole / 2 < _norm(scale * (update_B @ A + B @ update_A)) < 1.001 * whole
    gradient = B @ A  # its gradients are in the spaces of A and B
    update_A, update_B = _updates((B.mT @ gradient, gradient @ A.mT), (A, B), scale, rate=1e-4)
    assert _norm(scale * (update_B @ A + B @ update_A)) == pytest.approx(whole, rel=1e-3)


def _train(pair: Pair, scale: float, steps: int, rates: Sequence[float], **optim: Any) -> list[Tensor]:
    """The products s B A after each step towards a target, with the parts of MatrixAdamW that the engine provides."""

    class Whole:
        def replace(self, gradients: Any, update: Callable[..., Any]) -> None:
            stacks = [each.unsqueeze(0) for each in (*gradients.values(), *gradients)]
            for gradient, new in zip(gradients.values(), update(stacks, [Unit(("A", "B"), scale)]), strict=True):
                gradient.copy_(new[0])

    settings = OptimConfig(matrices="lora_muon", **optim)
    A, B = (nn.Parameter(each.clone()) for each in pair)
    rule = LoRAMuon(settings)
    group = {"params": [A, B], "name": "adapters", "moments": ("momentum",), "weight_decay": settings.weight_decay}
    optimizer = MatrixAdamW([group], {"adapters": rule}, lr=0.0)
    optimizer.matrices = {rule: Whole()}
    target = torch.randn(B.shape[0], A.shape[1], generator=torch.Generator().manual_seed(7))
    products = []
    for rate in rates[:steps]:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (scale * (B @ A) - target).square().sum().backward()
        optimizer.step()
        products.append((scale * B @ A).detach())
    return products


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_with_momentum_and_decay_are_those_of_the_formula(exact, shape, nesterov):
    """From B = 0 on, with a rate that rises."""
    scale, decay, old = 0.5, 0.9, 0.9
    rates = [2e-2, 4e-2, 6e-2, 6e-2, 6e-2]
    pair = _pair(*shape)[0], torch.zeros(shape[2], shape[0])
    found = _train(pair, scale, 5, rates, momentum=old, nesterov=nesterov, weight_decay=decay)
    A, B = (each.double() for each in pair)
    target = torch.randn(shape[2], shape[1], generator=torch.Generator().manual_seed(7)).double()
    momenta = [torch.zeros_like(A), torch.zeros_like(B)]
    for rate, product in zip(rates, found, strict=True):
        slope = 2 * scale * (scale * B @ A - target)
        gradients = [B.mT @ slope, slope @ A.mT]
        momenta = [old * m + (1 - old) * g for m, g in zip(momenta, gradients, strict=True)]
        ahead = [old * m + (1 - old) * g for m, g in zip(momenta, gradients, strict=True)]
        step_A, step_B = ahead if nesterov else momenta
        update_A, update_B = _expected((step_A, step_B), (A, B), scale, rate)
        kept = math.sqrt(1 - rate * decay)
        A, B = kept * A - rate / kept * update_A, kept * B - rate / kept * update_B
        assert torch.linalg.vector_norm(product - scale * B @ A) < 2e-3 * torch.linalg.vector_norm(product)
    assert _norm(found[-1]) > 1e-3


@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_the_products_steps_do_not_depend_on_how_its_size_is_shared(factor, start):
    A, B = _pair(4, 30, 20)
    B = torch.zeros_like(B) if start == "zero" else B
    rates, settings = [0.01, 0.02, 0.03, 0.03], {"momentum": 0.9, "weight_decay": 0.1}
    expected = _train((A, B), 1.0, 4, rates, **settings)
    found = _train((factor * A, B / factor), 1.0, 4, rates, **settings)
    for one, other in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(one - other) < 1e-3 * torch.linalg.vector_norm(other)
    rotated = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    found = _train((rotated @ A, B @ rotated.mT), 1.0, 4, rates, **settings)
    for one, other in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(one - other) < 1e-3 * torch.linalg.vector_norm(other)


@pytest.mark.parametrize("kept", ["no momentum of A", "a momentum of A"])
def test_at_zero_the_step_is_bounded(exact, kept):
    """B = 0, as at the start and after a merge: A changes by no more than its own size, and B by half of a step."""
    rate, (A, B) = 1e-3, _pair(4, 30, 20)
    B = torch.zeros_like(B)
    step_A, step_B = _pair(4, 30, 20, seed=1)
    step_A = step_A if kept == "a momentum of A" else torch.zeros_like(step_A)
    update_A, update_B = _updates((step_A, step_B), (A, B), rate=rate)
    assert torch.isfinite(update_A).all()
    assert bool(update_A.any()) == bool(step_A.any())
    assert rate * _norm(update_A) < 1.001 * _norm(A)
    half = 0.1 * math.sqrt(30)
    assert _norm(update_B @ A) == pytest.approx(half, rel=1e-3)
    assert rate**2 * _norm(update_B @ update_A) < 1.001 * rate * half


def test_a_product_is_never_longer_than_its_steps_allow(exact):
    """Three halves of them, with the term of second order, also in the first steps of a warmup."""
    A, B = _pair(6, 30, 20)
    rates = [1e-4 * step for step in range(1, 8)]
    products = [torch.zeros(20, 30), *_train((A, torch.zeros_like(B)), 1.0, 7, rates, weight_decay=0.0)]
    whole = 0.2 * math.sqrt(30)
    for rate, before, after in zip(rates, products, products[1:], strict=False):
        assert 0.25 * rate * whole < _norm(after - before) < 1.51 * rate * whole


def test_the_product_decays_as_a_single_matrix_does():
    """At a stationary point of the loss the product shrinks by the factor 1 - rate x decay."""
    A, B = (nn.Parameter(each) for each in _pair(4, 30, 20))
    before = (B @ A).detach()
    rule = LoRAMuon(OptimConfig())
    group = {"params": [A, B], "name": "adapters", "moments": ("momentum",), "weight_decay": 0.5}
    optimizer = MatrixAdamW([group], {"adapters": rule}, lr=0.1)
    optimizer.matrices = {rule: SimpleNamespace(replace=lambda *_: None)}
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    optimizer.step()
    assert torch.allclose((B @ A).detach(), 0.95 * before, rtol=1e-5, atol=1e-6)


def test_pairs_in_a_stack_do_not_affect_each_other():
    pairs, steps = [_pair(4, 30, 20, seed) for seed in (0, 1, 2)], [_pair(4, 30, 20, seed) for seed in (3, 4, 5)]
    (A, B), (step_A, step_B) = ([torch.stack(each) for each in zip(*of, strict=True)] for of in (pairs, steps))
    found = LoRAMuon(OptimConfig()).update_pairs((step_A, step_B), (A, B), 0.5, 1e-3)
    for number, (pair, step) in enumerate(zip(pairs, steps, strict=True)):
        for one, other in zip(_updates(step, pair, 0.5), found, strict=True):
            assert torch.allclose(one, other[number], atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4, 9), (6, 9, 4)])
def test_a_rank_above_the_layers_own_gives_finite_steps(shape):
    """Then a Gram matrix is singular, and so is what Newton-Schulz gets."""
    (A, B), steps = _pair(*shape), _pair(*shape, seed=1)
    slope = steps[1] @ steps[0]
    update_A, update_B = _updates((B.mT @ slope, slope @ A.mT), (A, B))
    assert 0 < _norm(update_B @ A + B @ update_A) < 1.3 * 0.2 * math.sqrt(max(shape[1:]))


@pytest.mark.parametrize("shape", [(8, 64, 64), (8, 40, 120), (64, 512, 256)])
def test_flops_and_workspace_are_what_an_update_needs(shape):
    pair, steps = _pair(*shape), _pair(*shape, seed=1)
    with FlopCounterMode(display=False) as counter:
        _updates(steps, pair)
    assert counter.get_total_flops() == LoRAMuon.flops(*shape)
    with PeakBytes() as peak:
        peak.inputs = {each.untyped_storage().data_ptr() for each in (*pair, *steps)}
        _updates(steps, pair)
    assert peak.peak == pytest.approx(LoRAMuon.workspace_bytes(*shape, on_gpu=False), rel=0.01)
