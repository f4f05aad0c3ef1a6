"""Muon on whole matrices, compared with its formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from launch.benchmark.measure import ByteTracker
from relora_mora.config.optim import OptimConfig
from relora_mora.config.registry import OPERATORS
from relora_mora.operators import make_operator
from relora_mora.optim import muon
from relora_mora.optim.muon import Muon, orthogonalize
from relora_mora.optim.rules import MatrixState
from tests.tools.each import each
from tests.tools.reference import orthogonal

BEGINS, LEAST, MOST = 0.02, 0.6, 1.3  # singular values from BEGINS of the norm become LEAST to MOST
SHAPES = [(1, 1), (1, 7), (7, 1), (12, 12), (5, 31), (31, 5), (64, 24)]


def _matrices(shape: tuple[int, int], count: int = 3) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def _updates(rule: Muon, gradients: Tensor) -> Tensor:
    """Of several matrices, after the element-wise part."""
    return rule.update_stack(gradients, [MatrixState(0, {})] * len(gradients))


def test_every_singular_value_in_the_interval_becomes_about_one():
    """A diagonal matrix has any singular values. The first one makes the norm 1."""
    values = torch.logspace(math.log10(BEGINS) + 1e-3, -2, 200)
    values[-1] = (1 - values[:-1].square().sum()).sqrt()
    found = orthogonalize(torch.diag(values)[None])[0].diagonal()
    assert found.min() > LEAST
    assert found.max() < MOST


def test_matrices_in_a_batch_do_not_affect_each_other():
    matrices = _matrices((12, 20))
    one_by_one = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    assert torch.allclose(orthogonalize(matrices), one_by_one, atol=1e-6)


def test_a_zero_matrix_stays_zero():
    assert not orthogonalize(torch.zeros(2, 4, 6)).any()


# ---- steps -------------------------------------------------------------------------------------------------------


class Reference:
    """One matrix in float64, as the paper writes it, with momentum as a sum of gradients."""

    def __init__(self, optim: OptimConfig) -> None:
        self.optim = optim
        self.momentum: Any = 0.0

    def step(self, gradient: Tensor) -> Tensor:
        mu = self.optim.momentum
        self.momentum = mu * self.momentum + gradient.double()
        step = mu * self.momentum + gradient if self.optim.nesterov else self.momentum
        return 0.2 * max(gradient.shape) ** 0.5 * orthogonal(step)


@each("nesterov", [True, False])
@each("shape", [(24, 24), (12, 40), (40, 12), (1, 9), (9, 1)])
def test_steps_follow_the_formulas(shape, nesterov):
    optim = OptimConfig(matrices="muon", momentum=0.8, nesterov=nesterov)
    rule, reference = Muon(optim), Reference(optim)
    moments = {"momentum": torch.zeros(shape)}
    for gradient in _matrices(shape, 5) * torch.tensor([1.0, 3.0, 0.1, 2.0, 5.0]).view(5, 1, 1):
        expected = reference.step(gradient)
        rule.update_moments(gradient, moments)
        actual = rule.update(gradient, MatrixState(0, {}))
        assert torch.linalg.vector_norm(actual - expected) < 1e-4 * torch.linalg.vector_norm(expected)


@each("shape", SHAPES)
def test_flops_are_what_torch_counts(shape):
    rule = Muon(OptimConfig())
    with FlopCounterMode(display=False) as counter:
        _updates(rule, _matrices(shape, 1))
    assert counter.get_total_flops() == rule.flops(*shape)


@each("shape", [(64, 64), (40, 120), (120, 40)])
def test_workspace_bytes_are_what_an_update_allocates(shape):
    rule, matrices = Muon(OptimConfig()), _matrices(shape, 1)
    with ByteTracker([matrices], matrices.device, 1) as tracker:
        _updates(rule, matrices)
    assert tracker.most - matrices.nbytes == pytest.approx(rule.workspace_bytes(*shape, on_gpu=False), rel=0.01)


# ---- the step of M as a step of W = D M C -------------------------------------------------------------------------

GROUPINGS = [kind for kind, record in OPERATORS.items() if record.groupings]  # 1 to 4, and 7
EVEN = [(12, 20, 4), (32, 64, 16), (64, 32, 16), (24, 24, 24), (9, 30, 3)]  # in, out, R


def _operator_matrices(kind: int, in_features: int, out_features: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """D [out, R] and C [R, in], in float64."""
    operator = make_operator(kind, in_features, out_features, size)
    D = operator.decompress(torch.eye(size, dtype=torch.float64)).mT
    return D, operator.compress(torch.eye(in_features, dtype=torch.float64)).mT


def _step_of_the_weight(kind: int, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Muon's step of M as a step of W, for a gradient of W at random; and this gradient within the space of D M C.

    These are all matrices that projections onto the columns of D and the rows of C leave alone.
    """
    D, C = _operator_matrices(kind, *shape)
    gradient = torch.randn(shape[1], shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = D @ Muon(OptimConfig()).update(D.mT @ gradient @ C.mT, MatrixState(0, {})) @ C
    return step, D @ torch.linalg.pinv(D) @ gradient @ torch.linalg.pinv(C) @ C


@pytest.fixture
def exact(monkeypatch):
    """U V^T of U S V^T in place of Newton-Schulz iterations."""

    def sign(matrices: torch.Tensor) -> torch.Tensor:
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        return left @ right

    monkeypatch.setattr(muon, "orthogonalize", sign)


@each("shape", EVEN)
@each("kind", GROUPINGS)
def test_with_even_groups_muons_step_of_m_is_steepest_for_w(exact, kind, shape):
    """The steepest step of W within the operator's space under the spectral norm is the sign of its gradient there."""
    in_features, out_features, size = shape
    step, gradient = _step_of_the_weight(kind, shape)
    norm = 0.2 * math.sqrt(in_features * out_features / size)
    left, values, right = torch.linalg.svd(gradient)
    assert torch.allclose(step, norm * left[:, :size] @ right[:size], rtol=0, atol=1e-10)
    assert float((gradient * step).sum()) == pytest.approx(norm * float(values.sum()), rel=1e-10)
    assert math.sqrt(float(step.square().mean())) == pytest.approx(0.2, rel=1e-10)
