"""Muon on whole matrices, compared with its formulas in float64."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launch.benchmark.measure import ByteTracker
from relora_mora.config.optim import OptimConfig
from relora_mora.optim.muon import Muon, orthogonalize
from relora_mora.optim.rules import MatrixState
from tests.tools.each import each
from tests.tools.reference import orthogonal

BEGINS, LEAST, MOST = 0.02, 0.6, 1.3  # singular values from BEGINS of the norm become LEAST to MOST


def _matrices(shape: tuple[int, int], count: int = 3) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_every_singular_value_in_the_interval_becomes_about_one():
    """A diagonal matrix has any singular values. The first one makes the norm 1."""
    values = torch.logspace(math.log10(BEGINS) + 1e-3, -2, 200)
    values[-1] = (1 - values[:-1].square().sum()).sqrt()
    found = orthogonalize(torch.diag(values)[None])[0].diagonal()
    assert found.min() > LEAST
    assert found.max() < MOST


def test_matrices_in_a_batch_do_not_affect_each_other():
    matrices = _matrices((12, 20))
    matrices[1] = 0
    one_by_one = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    assert torch.allclose(orthogonalize(matrices), one_by_one, atol=1e-6)
    assert not one_by_one[1].any()


@each("nesterov", [True, False])
@each("shape", [(24, 24), (12, 40), (40, 12), (1, 9), (9, 1)])
def test_steps_follow_the_formulas(shape, nesterov):
    """As the paper writes them, in float64 and with momentum as a sum of gradients."""
    rule = Muon(OptimConfig(matrices="muon", momentum=0.8, nesterov=nesterov))
    moments = {"momentum": torch.zeros(shape)}
    total = torch.zeros(shape, dtype=torch.float64)
    for gradient in _matrices(shape, 5) * torch.tensor([1.0, 3.0, 0.1, 2.0, 5.0]).view(5, 1, 1):
        total = 0.8 * total + gradient
        expected = 0.2 * max(shape) ** 0.5 * orthogonal(0.8 * total + gradient if nesterov else total)
        rule.update_moments(gradient, moments)
        actual = rule.update(gradient, MatrixState(0, {}))
        assert torch.linalg.vector_norm(actual - expected) < 1e-4 * torch.linalg.vector_norm(expected)


@each("shape", [(64, 64), (40, 120), (120, 40)])
def test_the_plan_knows_flops_and_memory_of_an_update(shape):
    rule, matrices = Muon(OptimConfig()), _matrices(shape, 1)
    with FlopCounterMode(display=False) as counter, ByteTracker([matrices], matrices.device, 1) as tracker:
        rule.update_stack(matrices, [MatrixState(0, {})])
    assert counter.get_total_flops() == rule.flops(*shape)
    assert tracker.most - matrices.nbytes == pytest.approx(rule.workspace_bytes(*shape, on_gpu=False), rel=0.01)
