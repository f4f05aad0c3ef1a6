"""GaLore, Fira, APOLLO, APOLLO-Mini and SUMO on whole matrices.

They are compared with their formulas in float64 and, except SUMO, with the released packages.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from relora_mora.config.optim import OptimConfig
from relora_mora.optim.groups import matrix_rules
from relora_mora.optim.projected import Apollo, _Projected
from relora_mora.optim.rules import MatrixState, new_state
from relora_mora.system.seeds import derived_seed
from tests.tools.memory import PeakBytes

RULES = ("galore", "fira", "apollo", "apollo_mini", "sumo")
SHAPES = [(12, 12), (5, 31), (31, 5), (24, 16)]
STEPS = 7
EVERY = 3  # renewals at the steps 1, 4 and 7
SEED = 11


def _optim(name: str, **settings: Any) -> OptimConfig:
    defaults = {"projection_rank": 4, "projection_every": EVERY, "betas": (0.8, 0.9), "eps": 1e-3}
    return OptimConfig(matrices=name, **{**defaults, **settings})


def _rule(name: str, **settings: Any) -> _Projected:
    rule = matrix_rules(_optim(name, **settings))["linears"]
    assert isinstance(rule, _Projected)
    return rule


def _state(rule: _Projected, shape: tuple[int, int]) -> MatrixState:
    return new_state(SEED, rule.state_shapes(*shape))


def _gradients(shape: tuple[int, int]) -> list[Tensor]:
    """Gradients that grow by about a third in each step, so that the limiter applies."""
    generator = torch.Generator().manual_seed(sum(shape))
    common = torch.randn(shape, generator=generator)
    return [1.3**step * (common + torch.randn(shape, generator=generator)) for step in range(STEPS)]


def _updates(rule: _Projected, shape: tuple[int, int]) -> list[Tensor]:
    state = _state(rule, shape)
    return [rule.update(gradient.clone()[None], [state])[0].clone() for gradient in _gradients(shape)]


def _with_signs_of(before: Tensor, vectors: Tensor) -> Tensor:
    """The column vectors, each with the sign that brings it closer to the same column of ``before``."""
    return torch.stack([new if old @ new >= 0 else -new for old, new in zip(before.T, vectors.T, strict=True)], dim=1)


def _polar(matrix: Tensor) -> Tensor:
    """(X X^T)^(-1/2) X by an eigendecomposition, without the directions that X does not have."""
    if len(matrix) > matrix.shape[1]:
        return _polar(matrix.T).T
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    inverse = torch.where(values > 1e-10 * values.max(), values.clamp(min=1e-300) ** -0.5, 0.0)
    return vectors * inverse @ vectors.T @ matrix


# ---- the formulas, without transposing matrices ---------------------------------------------------------------------


class Reference:
    """One matrix in float64. A tall or square matrix is projected from the right: R = G P."""

    def __init__(self, name: str, optim: OptimConfig, scale: float) -> None:
        self.name = name
        self.optim = optim
        self.scale = scale
        self.steps = 0
        self.projection = self.first = self.second = self.last = None
        self.growth = 1.1 if name == "sumo" else 1.01

    def step(self, gradient: Tensor) -> Tensor:
        gradient = gradient.double()
        rows, columns = gradient.shape
        right = rows >= columns
        rank = 1 if self.name == "apollo_mini" else min(self.optim.projection_rank, rows, columns)
        before = self.projection
        if self.steps % self.optim.projection_every == 0:
            self.projection = self._projection(gradient, right, rank)
        self.steps += 1
        to = (lambda g: g @ self.projection) if right else (lambda g: self.projection.T @ g)
        back = (lambda r: r @ self.projection.T) if right else (lambda r: self.projection @ r)
        small = to(gradient)
        if self.name == "sumo":
            if self.first is not None:  # the momentum in the whole space, then in the new subspace
                self.first = to(self.first @ before.T if right else before @ self.first)
            self.first = (0 if self.first is None else self.optim.momentum * self.first) + small
            return self.scale * max(gradient.shape) ** 0.5 * back(self._limited(_polar(self.first)))
        b1, b2 = self.optim.betas
        self.first = (0 if self.first is None else b1 * self.first) + (1 - b1) * small
        self.second = (0 if self.second is None else b2 * self.second) + (1 - b2) * small**2
        adam = self.first / (self.second**0.5 + self.optim.eps)
        correction = math.sqrt(1 - b2**self.steps) / (1 - b1**self.steps)
        if self.name == "galore":
            return correction * self.scale * back(adam)
        along = (0, 1) if self.name == "apollo_mini" else 1 if right else 0
        growth = (adam**2).sum(along, keepdim=True) ** 0.5 / ((small**2).sum(along, keepdim=True) ** 0.5 + 1e-8)
        if self.name == "fira":
            return correction * (
                self.scale * back(adam) + self._limited((gradient - self.scale * back(small)) * growth)
            )
        return correction * math.sqrt(self.scale) * self._limited(gradient * growth)

    def _projection(self, gradient: Tensor, right: bool, rank: int) -> Tensor:
        if not self.name.startswith("apollo"):
            left, _, transposed = torch.linalg.svd(gradient)
            vectors = transposed[:rank].T if right else left[:, :rank]
            return vectors if self.projection is None else _with_signs_of(self.projection, vectors)
        generator = torch.Generator().manual_seed(derived_seed(SEED, self.steps // self.optim.projection_every))
        return torch.randn(min(gradient.shape), rank, generator=generator).double() / math.sqrt(rank)

    def _limited(self, step: Tensor) -> Tensor:
        norm = (step**2).sum() ** 0.5
        if self.last is not None and norm > self.growth * (self.last + 1e-8):
            step = step * (self.growth * (self.last + 1e-8) / norm)
        self.last = (step**2).sum() ** 0.5
        return step


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name,scale,used",
    [
        ("galore", None, 0.25),
        ("fira", None, 0.25),
        ("fira", 0.6, 0.6),
        ("apollo", None, 1.0),
        ("apollo_mini", None, 128.0),
        ("apollo_mini", 0.6, 128.0),
        ("sumo", None, 0.2),
        ("sumo", 0.6, 0.6),
    ],
)
def test_steps_follow_the_formulas(name, scale, used, shape):
    reference = Reference(name, _optim(name), used)
    for actual, gradient in zip(_updates(_rule(name, projection_scale=scale), shape), _gradients(shape), strict=True):
        expected = reference.step(gradient)
        assert torch.linalg.vector_norm(actual - expected) < 1e-4 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("name", RULES)
def test_a_rank_above_the_shorter_side_is_cut_to_that_side(name):
    wide, exact = (_updates(_rule(name, projection_rank=rank), (5, 31)) for rank in (128, 5))
    assert all(torch.equal(a, b) for a, b in zip(wide, exact, strict=True))


def test_galore_of_full_rank_is_adam_in_another_basis():
    """The projection covers the whole space and is never renewed. With one row, the basis is the same as Adam's."""
    updates = _updates(_rule("galore", projection_every=100, projection_scale=1.0, eps=1e-12), (1, 9))
    weight = torch.nn.Parameter(torch.zeros(1, 9))
    adam = torch.optim.Adam([weight], lr=1.0, betas=(0.8, 0.9), eps=1e-12)
    for update, gradient in zip(updates, _gradients((1, 9)), strict=True):
        before = weight.detach().clone()
        weight.grad = gradient
        adam.step()
        assert torch.allclose(before - weight, update, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_sumo_of_full_rank_is_muon_with_exact_singular_values(shape):
    """Renewals do not matter, because P^T P_old is a rotation."""
    momentum = torch.zeros(shape).double()
    for update, gradient in zip(_updates(_rule("sumo", projection_rank=64), shape), _gradients(shape), strict=True):
        momentum = 0.95 * momentum + 0.05 * gradient
        expected = 0.2 * math.sqrt(max(shape)) * _polar(momentum)
        assert torch.linalg.vector_norm(update - expected) < 1e-4 * torch.linalg.vector_norm(expected)


def test_sumo_does_not_step_in_directions_without_momentum_and_turns_to_new_ones_slowly():
    """A singular value of zero has arbitrary vectors. The norm of a step grows by at most a tenth."""
    rule = _rule("sumo", projection_every=1)
    state = _state(rule, (5, 31))
    first, full = torch.ones(5, 1) * torch.linspace(1, 2, 31), _gradients((5, 31))[0]
    one = rule.update(first.clone()[None], [state])[0]
    assert torch.allclose(one, 0.2 * math.sqrt(31) * first / torch.linalg.vector_norm(first), atol=1e-5)
    norms = [torch.linalg.vector_norm(rule.update(full.clone()[None], [state])) for _ in range(12)]
    grown = torch.stack(norms) / torch.linalg.vector_norm(one)
    assert torch.allclose(grown, torch.tensor([min(1.1**step, 2.0) for step in range(1, 13)]), rtol=1e-4)


def test_apollos_draws_depend_only_on_seed_and_renewal():
    rule = _rule("apollo")
    draws = [rule._drawn(6, seed, done, torch.device("cpu")) for seed, done in [(1, 0), (1, 2), (1, 3), (2, 0)]]
    assert torch.equal(draws[0], draws[1])
    assert not any(torch.equal(draws[0], other) for other in draws[2:])
    large = Apollo(_optim("apollo", projection_rank=64))._drawn(400, 1, 0, torch.device("cpu"))
    assert float(large.square().mean()) == pytest.approx(1 / 64, rel=0.05)


@pytest.mark.parametrize("name", RULES)
def test_an_initial_zero_gradient_makes_no_step_and_does_not_limit_later_ones(name):
    rule = _rule(name)
    state = _state(rule, (5, 7))
    assert not rule.update(torch.zeros(1, 5, 7), [state]).any()
    gradient = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0))
    update = rule.update(gradient, [state])
    assert update.isfinite().all()
    assert torch.linalg.vector_norm(update) > 0.1


@pytest.mark.parametrize("done", [0, EVERY, 2 * EVERY])
@pytest.mark.parametrize("shape", [(5, 31), (31, 5)])
@pytest.mark.parametrize("name", ["galore", "fira", "sumo"])
def test_a_matrix_whose_projection_is_due_waits_for_a_gradient(name, shape, done):
    """LoRA's A has none while B is zero. Vectors of a zero matrix would stay for projection_every steps."""
    rule = _rule(name, projection_rank=2)
    state, waited = _state(rule, shape), _state(rule, shape)
    before, after = _gradients(shape)[:done], _gradients(shape)[done:]
    for gradient in before:
        rule.update(gradient.clone()[None], [state])
        rule.update(gradient.clone()[None], [waited])
    for _ in range(EVERY + 1):
        assert not rule.update(torch.zeros(1, *shape), [waited]).any()
    for gradient in after:
        expected = rule.update(gradient.clone()[None], [state])[0]
        assert torch.equal(rule.update(gradient.clone()[None], [waited])[0], expected)
        assert expected.any(dim=0).all()
        assert expected.any(dim=1).all()
    assert all(torch.equal(value, waited.tensors[key]) for key, value in state.tensors.items())


@pytest.mark.parametrize("name", ["fira", "apollo", "apollo_mini"])
def test_a_zero_gradient_does_not_change_the_limiter(name):
    rule = _rule(name)
    state = _state(rule, (5, 31))
    first, second = _gradients((5, 31))[:2]
    rule.update(first[None], [state])
    norm = state.tensors["limited_norm"].fill_(1e-3)  # the next gradient is larger
    rule.update(torch.zeros(1, 5, 31), [state])
    assert float(norm) == pytest.approx(1e-3)
    rule.update(second[None], [state])
    assert float(norm) == pytest.approx(1.01e-3, rel=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_each_of_several_matrices_has_its_own_state(name):
    rule = _rule(name)
    gradients = torch.stack(_gradients((5, 9))[:3])
    states = [_state(rule, (5, 9)) for _ in gradients]
    rule.update(gradients[:1].clone(), states[:1])  # one is a step ahead
    separate = [_state(rule, (5, 9)) for _ in gradients]
    rule.update(gradients[:1].clone(), separate[:1])
    expected = [
        rule.update(gradient.clone()[None], [state])[0] for gradient, state in zip(gradients, separate, strict=True)
    ]
    assert torch.equal(rule.update(gradients, states), torch.stack(expected))
    assert [int(state.tensors["updates"]) for state in states] == [2, 1, 1]


@pytest.mark.parametrize("shape", [(5, 31), (31, 5), (12, 12)])
@pytest.mark.parametrize("name", RULES)
def test_flops_are_what_torch_counts(name, shape):
    rule = _rule(name)
    state = _state(rule, shape)
    with FlopCounterMode(display=False) as counter:
        rule.update(torch.randn(1, *shape), [state])
    assert counter.get_total_flops() == rule.flops(*shape)


@pytest.mark.parametrize("shape", [(256, 256), (160, 480), (480, 160)])
@pytest.mark.parametrize(
    "name,rank", [("galore", 64), ("fira", 64), ("apollo", 64), ("apollo", 150), ("apollo_mini", 64), ("sumo", 64)]
)
def test_workspace_bytes_are_what_an_update_allocates(name, rank, shape):
    rule = _rule(name, projection_rank=rank)
    state = _state(rule, shape)
    matrices = torch.randn(1, *shape)
    with PeakBytes() as peak:
        peak.inputs = {tensor.untyped_storage().data_ptr() for tensor in (matrices, *state.tensors.values())}
        rule.update(matrices, [state])
    assert peak.peak == pytest.approx(rule.workspace_bytes(*shape, on_gpu=False), rel=0.03)


# ---- the released packages ------------------------------------------------------------------------------------------

PACKAGES = {
    "galore": ("galore_torch", "adamw", {"scale": 0.3}),
    "fira": ("fira", "fira_adamw", {"alpha": 0.3}),
    "apollo": ("apollo_torch", "apollo", {"scale": 0.3, "proj": "random", "scale_type": "channel"}),
    "apollo_mini": ("apollo_torch", "apollo", {"rank": 1, "scale": 128, "proj": "random", "scale_type": "tensor"}),
}


def _released(package: str, module: str, patch: pytest.MonkeyPatch) -> Any:
    """The AdamW of a module, without the package's other imports (bitsandbytes)."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations or ())
    patch.setitem(sys.modules, package, bare)
    return importlib.import_module(f"{package}.{module}").AdamW


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PACKAGES)
def test_steps_equal_the_released_package(name, shape, monkeypatch):
    package, module, settings = PACKAGES[name]
    adamw = _released(package, module, monkeypatch)
    weight = torch.nn.Parameter(torch.zeros(shape))
    group = {"params": [weight], "rank": 4, "update_proj_gap": EVERY, "proj_type": "std", **settings}
    theirs = adamw([group], lr=1.0, betas=(0.8, 0.9), eps=1e-3, no_deprecation_warning=True)
    rule = _rule(name, projection_scale=0.3)
    state = _state(rule, shape)
    for gradient in _gradients(shape):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        theirs.step()
        projection = theirs.state[weight]["projector"].ortho_matrix
        projection = projection if shape[0] < shape[1] else projection.T
        if name.startswith("apollo"):
            monkeypatch.setattr(Apollo, "_drawn", lambda *_, p=projection: p)
        else:  # with the signs of the package's SVD
            monkeypatch.setattr(_Projected, "_singular", lambda *_, p=projection: p)
        actual = rule.update(gradient.clone()[None], [state])[0]
        expected = before - weight.detach()
        assert torch.linalg.vector_norm(actual - expected) < 2e-5 * torch.linalg.vector_norm(expected)
