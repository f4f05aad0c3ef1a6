"""Muon's arithmetic on whole matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from relora_mora.config.schema import OptimConfig
from relora_mora.optim.groups import matrix_rules
from relora_mora.optim.muon import Muon, orthogonalize
from tests.tools.memory import PeakBytes

SHAPES = [(1, 1), (1, 7), (7, 1), (12, 12), (5, 31), (31, 5), (64, 24)]


def _matrices(shape: tuple[int, int], count: int = 3) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_about_one_and_singular_vectors_do_not_change(shape):
    matrices = _matrices(shape) * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1)
    for before, after in zip(matrices.double(), orthogonalize(matrices).double(), strict=True):
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        rotated = left.mT @ after @ right.mT
        off = rotated - torch.diag(rotated.diagonal())
        assert off.abs().max() < 2e-4
        large = rotated.diagonal()[values > 0.02 * values[0]]
        assert large.min() > 0.6
        assert rotated.diagonal().max() < 1.3


def test_matrices_in_a_batch_do_not_affect_each_other():
    matrices = _matrices((12, 20))
    one_by_one = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    assert torch.allclose(orthogonalize(matrices), one_by_one, atol=1e-6)


def test_a_zero_matrix_stays_zero():
    assert not orthogonalize(torch.zeros(2, 4, 6)).any()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_steps_equal_torchs_muon(shape, nesterov):
    """They agree up to a few percent of the step, since torch's Muon iterates in bf16."""
    gradients = _matrices(shape, 4)
    weight = torch.nn.Parameter(torch.zeros(shape))
    settings = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon([weight], nesterov=nesterov, **settings)
    rule = Muon(OptimConfig(matrices="muon", momentum=0.9, nesterov=nesterov))
    ours = torch.zeros(shape)
    state = {"momentum": torch.zeros(shape)}
    for gradient in gradients:
        weight.grad = gradient.clone()
        theirs.step()
        update = gradient.clone()
        rule.update_moments(update, state)
        ours -= rule.update(update[None])[0]
    assert torch.linalg.vector_norm(ours - weight) < 0.05 * torch.linalg.vector_norm(ours)
    assert torch.linalg.vector_norm(ours) > 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_steps_elements_have_a_root_mean_square_of_a_fifth(shape):
    update = Muon(OptimConfig()).update(_matrices(shape))
    assert 0.12 < math.sqrt(float(update.square().mean())) < 0.26


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_what_torch_counts(shape):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(_matrices(shape, 1))
    assert counter.get_total_flops() == Muon.flops(*shape)


@pytest.mark.parametrize("shape", [(64, 64), (40, 120), (120, 40)])
def test_workspace_bytes_are_what_an_update_allocates(shape):
    matrices = _matrices(shape, 1)
    with PeakBytes() as peak:
        peak.inputs = {matrices.untyped_storage().data_ptr()}
        Muon(OptimConfig()).update(matrices)
    assert peak.peak == pytest.approx(Muon.workspace_bytes(*shape, on_gpu=False), rel=0.01)


def test_the_settings_name_the_rule():
    rules = matrix_rules(OptimConfig(matrices="muon"))
    assert rules.keys() == {"adapters", "linears"}
    assert all(isinstance(rule, Muon) for rule in rules.values())
    assert matrix_rules(OptimConfig()) == {}
