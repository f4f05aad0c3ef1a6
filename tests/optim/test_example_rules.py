"""The rules in examples/optimizers on whole matrices, compared with their formulas in float64."""

import math
from typing import Any

import torch
from torch import Tensor

from relora_mora.config.optim import OptimConfig
from relora_mora.optim.own import own_rule
from relora_mora.optim.rules import MatrixRule, MatrixState, shapes_of
from relora_mora.system.seeds import derived_seed
from tests.tools.each import each
from tests.tools.rules import matrices_settings

SHAPES = [(12, 12), (5, 31), (31, 5), (24, 16)]
STEPS = 7
EVERY = 3  # renewals at the steps 1, 4 and 7
SEED = 11
BETAS, EPS = (0.8, 0.9), 1e-3


def _rule(name: str, **settings: Any) -> MatrixRule:
    defaults = {"rank": 4, "every": EVERY, "betas": BETAS, "eps": EPS}
    return own_rule(OptimConfig(**matrices_settings(name, **{**defaults, **settings})))


def _state(rule: MatrixRule, shape: tuple[int, int]) -> MatrixState:
    return MatrixState(SEED, shapes_of(rule, *shape))


def _gradients(shape: tuple[int, int]) -> list[Tensor]:
    """Gradients that grow by about a third in each step, so that the limiter applies."""
    generator = torch.Generator().manual_seed(sum(shape))
    common = torch.randn(shape, generator=generator)
    return [1.3**step * (common + torch.randn(shape, generator=generator)) for step in range(STEPS)]


class Reference:
    """One matrix in float64. A tall or square matrix is projected from the right: R = G P."""

    def __init__(self, name: str, scale: float) -> None:
        self.name = name
        self.scale = scale
        self.steps = 0
        self.projection = self.first = self.second = self.last = None

    def step(self, gradient: Tensor) -> Tensor:
        gradient = gradient.double()
        right = gradient.shape[0] >= gradient.shape[1]
        if self.steps % EVERY == 0:
            self.projection = self._projection(gradient, right)
        self.steps += 1
        small = gradient @ self.projection if right else self.projection.T @ gradient
        b1, b2 = BETAS
        self.first = (0 if self.first is None else b1 * self.first) + (1 - b1) * small
        self.second = (0 if self.second is None else b2 * self.second) + (1 - b2) * small**2
        adam = self.first / (self.second**0.5 + EPS)
        correction = math.sqrt(1 - b2**self.steps) / (1 - b1**self.steps)
        if self.name == "galore":
            return correction * self.scale * (adam @ self.projection.T if right else self.projection @ adam)
        along = 1 if right else 0
        growth = (adam**2).sum(along, keepdim=True) ** 0.5 / ((small**2).sum(along, keepdim=True) ** 0.5 + 1e-8)
        return correction * math.sqrt(self.scale) * self._limited(gradient * growth)

    def _projection(self, gradient: Tensor, right: bool) -> Tensor:
        if self.name == "galore":
            left, _, transposed = torch.linalg.svd(gradient)
            vectors = transposed[:4].T if right else left[:, :4]
            if self.projection is None:
                return vectors
            pairs = zip(self.projection.T, vectors.T, strict=True)
            return torch.stack([new if old @ new >= 0 else -new for old, new in pairs], dim=1)
        generator = torch.Generator().manual_seed(derived_seed(SEED, self.steps // EVERY))
        return torch.randn(min(gradient.shape), 4, generator=generator).double() / 2

    def _limited(self, step: Tensor) -> Tensor:
        norm = (step**2).sum() ** 0.5
        if self.last is not None and norm > 1.01 * (self.last + 1e-8):
            step = step * (1.01 * (self.last + 1e-8) / norm)
        self.last = (step**2).sum() ** 0.5
        return step


@each("shape", SHAPES)
@each("name,scale", [("galore", 0.25), ("galore", 0.6), ("apollo", 1.0), ("apollo", 0.6)])
def test_steps_follow_the_formulas(name, scale, shape):
    rule, reference = _rule(name, scale=scale), Reference(name, scale)
    state = _state(rule, shape)
    for gradient in _gradients(shape):
        expected = reference.step(gradient)
        actual = rule.update(gradient, state)
        assert torch.linalg.vector_norm(actual - expected) < 1e-4 * torch.linalg.vector_norm(expected)


@each("done", [0, EVERY, 2 * EVERY])
@each("shape", [(5, 31), (31, 5)])
def test_a_matrix_of_galore_whose_projection_is_due_waits_for_a_gradient(shape, done):
    """LoRA's A has none while B is zero. Vectors of a zero matrix would stay until the next renewal."""
    rule = _rule("galore", rank=2)
    state, waited = _state(rule, shape), _state(rule, shape)
    before, after = _gradients(shape)[:done], _gradients(shape)[done:]
    for gradient in before:
        rule.update(gradient.clone(), state)
        rule.update(gradient.clone(), waited)
    for _ in range(EVERY + 1):
        assert not rule.update(torch.zeros(shape), waited).any()
    for gradient in after:
        expected = rule.update(gradient.clone(), state)
        assert torch.equal(rule.update(gradient.clone(), waited), expected)
        assert expected.any(dim=0).all()
        assert expected.any(dim=1).all()
    assert all(torch.equal(value, waited[key]) for key, value in state.items())
