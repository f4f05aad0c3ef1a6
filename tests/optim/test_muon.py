"""Muon, Muon with Polar Express and NorMuon on whole matrices, compared with their formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from relora_mora.config.optim import OptimConfig
from relora_mora.config.registry import OPERATORS
from relora_mora.operators import make_operator
from relora_mora.optim import muon
from relora_mora.optim.groups import matrix_rules
from relora_mora.optim.muon import POLAR_EXPRESS, SAFETY, Muon, NorMuon, PolarMuon, orthogonalize
from relora_mora.optim.rules import MatrixState, new_state
from tests.tools.memory import PeakBytes

RULES = {"muon": Muon, "polar_muon": PolarMuon, "normuon": NorMuon}
WAYS: dict[str, tuple[Any, ...]] = {"Newton-Schulz": (), "Polar Express": (POLAR_EXPRESS, SAFETY)}
BANDS = {"Newton-Schulz": (0.02, 0.6, 1.3), "Polar Express": (0.002, 0.85, 1.15)}
SHAPES = [(1, 1), (1, 7), (7, 1), (12, 12), (5, 31), (31, 5), (64, 24)]


def _matrices(shape: tuple[int, int], count: int = 3) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def _state(rule: Muon, shape: tuple[int, int]) -> MatrixState:
    return new_state(0, rule.state_shapes(*shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_singular_values_become_about_one_and_singular_vectors_do_not_change(way, shape):
    matrices = _matrices(shape) * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1)
    begins, least, most = BANDS[way]
    for before, after in zip(matrices.double(), orthogonalize(matrices, *WAYS[way]).double(), strict=True):
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        rotated = left.mT @ after @ right.mT
        off = rotated - torch.diag(rotated.diagonal())
        assert off.abs().max() < 2e-4
        large = rotated.diagonal()[values > begins * torch.linalg.vector_norm(before)]
        assert large.min() > least
        assert rotated.diagonal().max() < most


@pytest.mark.parametrize("way", WAYS)
def test_every_singular_value_in_the_interval_becomes_about_one(way):
    """A diagonal matrix has any singular values. The first one makes the norm 1."""
    begins, least, most = BANDS[way]
    values = torch.logspace(math.log10(begins) + 1e-3, -2, 200)
    values[-1] = (1 - values[:-1].square().sum()).sqrt()
    found = orthogonalize(torch.diag(values)[None], *WAYS[way])[0].diagonal()
    assert least < found.min()
    assert found.max() < most


# ---- where the coefficients of Polar Express come from -----------------------------------------------------------


def _value(polynomial: Tensor, x: Any) -> Any:
    a, b, c = polynomial
    return a * x + b * x**3 + c * x**5


def _closest_to_one(begin: float, end: float) -> Tensor:
    """The odd polynomial of degree 5 whose largest distance from 1 on [begin, end] is smallest, by Remez's exchange.

    Its errors at four points are equal, with alternating signs: at both ends and at its two extrema.
    """
    points = torch.tensor([begin, (3 * begin + end) / 4, (begin + 3 * end) / 4, end], dtype=torch.float64)
    error = before = math.inf
    while error == math.inf or abs(error - before) > 1e-15:
        signs = torch.tensor([1, -1, 1, -1])
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, last = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64))
        error, before = float(last), error
        root = (9 * b * b - 20 * a * c).sqrt()  # of the derivative a + 3 b x^2 + 5 c x^4
        points[1:3] = ((torch.stack([-root, root]) - 3 * b) / (10 * c)).sqrt()
    return torch.stack([a, b, c])


@pytest.mark.parametrize("begin", [0.02, 0.1, 0.5])
def test_the_exchange_finds_the_closest_polynomial(begin):
    polynomial = _closest_to_one(begin, 1.0)
    x = torch.linspace(begin, 1, 5001, dtype=torch.float64)
    error = (_value(polynomial, x) - 1).abs().max()
    for change in 1e-3 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double():
        assert (_value(polynomial + change, x) - 1).abs().max() > error


def test_the_coefficients_of_polar_express_are_those_of_the_paper():
    """Appendix G: an interval begins at 1/50 of its end or above; then both ends are made equally far from 1."""
    begin, end = 1e-3, 1.0
    powers = torch.tensor([1, 3, 5], dtype=torch.float64)
    for number, published in enumerate(POLAR_EXPRESS):
        polynomial = _closest_to_one(max(begin, 0.02 * end), end)
        polynomial *= 2 / (_value(polynomial, begin) + _value(polynomial, end))
        if number < len(POLAR_EXPRESS) - 1:
            polynomial /= SAFETY**powers
        assert polynomial.tolist() == pytest.approx(published, rel=1e-12)
        begin = float(_value(polynomial, begin))
        end = 2 - begin


@pytest.mark.parametrize("way", WAYS)
def test_matrices_in_a_batch_do_not_affect_each_other(way):
    matrices = _matrices((12, 20))
    one_by_one = torch.cat([orthogonalize(matrix[None], *WAYS[way]) for matrix in matrices])
    assert torch.allclose(orthogonalize(matrices, *WAYS[way]), one_by_one, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_zero_matrix_stays_zero(way):
    assert not orthogonalize(torch.zeros(2, 4, 6), *WAYS[way]).any()


# ---- steps -------------------------------------------------------------------------------------------------------


class Reference:
    """One matrix in float64, element by element as the papers write it, with momentum as a sum of gradients."""

    def __init__(self, name: str, optim: OptimConfig) -> None:
        self.name = name
        self.optim = optim
        self.momentum: Any = 0.0
        self.row_squares: Any = 0.0

    def step(self, gradient: Tensor) -> Tensor:
        mu, second, m, n = self.optim.momentum, self.optim.betas[1], *gradient.shape
        self.momentum = mu * self.momentum + gradient.double()
        step = mu * self.momentum + gradient if self.optim.nesterov else self.momentum
        if self.name == "polar_muon":
            x = step / (1.02 * (step**2).sum() ** 0.5 + 1e-6)
            for a, b, c in POLAR_EXPRESS:
                x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
        else:
            x = step / (step**2).sum() ** 0.5
            for _ in range(5):
                x = 3.4445 * x - 4.775 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
        norm = (x**2).sum() ** 0.5
        if self.name == "normuon":
            self.row_squares = second * self.row_squares + (1 - second) * (x**2).sum(dim=1, keepdim=True) / n
            x = x / (self.row_squares**0.5 + self.optim.eps)
        return 0.2 * max(m, n) ** 0.5 * norm * x / (x**2).sum() ** 0.5


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12), (1, 9), (9, 1)])
@pytest.mark.parametrize("name", RULES)
def test_steps_follow_the_formulas(name, shape, nesterov):
    optim = OptimConfig(matrices=name, momentum=0.8, nesterov=nesterov, betas=(0.1, 0.7), eps=1e-3)
    rule = matrix_rules(optim)["linears"]
    reference = Reference(name, optim)
    moments, state = {"momentum": torch.zeros(shape)}, _state(rule, shape)
    for gradient in _matrices(shape, 5) * torch.tensor([1.0, 3.0, 0.1, 2.0, 5.0]).view(5, 1, 1):
        expected = reference.step(gradient)
        rule.update_moments(gradient, moments)
        actual = rule.update(gradient[None], [state])[0]
        assert torch.linalg.vector_norm(actual - expected) < 1e-4 * torch.linalg.vector_norm(expected)
    if name == "normuon":
        assert torch.allclose(state.tensors["row_avg_sq"].double(), reference.row_squares[:, 0], rtol=1e-4)


def test_normuon_balances_the_rows_of_a_tall_matrix():
    """With steady gradients all rows get the same norm; Muon's differ because 64 rows share 24 directions."""
    shape, norms = (64, 24), {}
    gradient = _matrices(shape, 1)[0] * torch.logspace(-1, 1, 64)[:, None]
    for name in ("muon", "normuon"):
        rule = matrix_rules(OptimConfig(matrices=name))["linears"]
        state = _state(rule, shape)
        for _ in range(2):
            update = rule.update(gradient.clone()[None], [state])[0]
        norms[name] = torch.linalg.vector_norm(update, dim=1)
        assert torch.linalg.vector_norm(update) == pytest.approx(0.2 * 8 * math.sqrt(24), rel=0.2)
    assert norms["muon"].max() > 5 * norms["muon"].min()
    assert norms["normuon"].max() < 1.001 * norms["normuon"].min()


def test_normuon_survives_zeros_and_keeps_each_matrix_to_itself():
    """A zero matrix makes no step, at first and later, and neither does a zero row; the others do not notice."""
    optim = OptimConfig(matrices="normuon", eps=1e-20)
    rule, shape = NorMuon(optim), (5, 7)
    alone, states = _state(rule, shape), [_state(rule, shape) for _ in range(3)]
    for number, matrix in enumerate(_matrices(shape, 4)):
        zero_row = matrix.clone()
        zero_row[2] = 0
        late = matrix * (number == 1)
        updates = rule.update(torch.stack([matrix, zero_row, late]), states)
        assert torch.allclose(updates[0], rule.update(matrix[None], [alone])[0], atol=1e-6)
        assert not updates[1][2].any()
        assert updates[1].any(dim=1).sum() == 4
        assert updates[2].any() == (number == 1)
        assert updates.isfinite().all()
    assert all(state.tensors["row_avg_sq"].isfinite().all() for state in states)


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
@pytest.mark.parametrize("rule", RULES.values())
def test_a_steps_elements_have_a_root_mean_square_of_a_fifth(rule, shape):
    rule = rule(OptimConfig())
    update = rule.update(_matrices(shape), [_state(rule, shape) for _ in range(3)])
    assert 0.12 < math.sqrt(float(update.square().mean())) < 0.26


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES.values())
def test_flops_are_what_torch_counts(rule, shape):
    rule = rule(OptimConfig())
    with FlopCounterMode(display=False) as counter:
        rule.update(_matrices(shape, 1), [_state(rule, shape)])
    assert counter.get_total_flops() == rule.flops(*shape)


@pytest.mark.parametrize("shape", [(64, 64), (40, 120), (120, 40)])
@pytest.mark.parametrize("rule", RULES.values())
def test_workspace_bytes_are_what_an_update_allocates(rule, shape):
    rule, matrices = rule(OptimConfig()), _matrices(shape, 1)
    state = _state(rule, shape)
    with PeakBytes() as peak:
        peak.inputs = {tensor.untyped_storage().data_ptr() for tensor in (matrices, *state.tensors.values())}
        rule.update(matrices, [state])
    assert peak.peak == pytest.approx(rule.workspace_bytes(*shape, on_gpu=False), rel=0.01)


@pytest.mark.parametrize("name", RULES)
def test_the_settings_name_the_rule(name):
    rules = matrix_rules(OptimConfig(matrices=name))
    assert rules.keys() == {"adapters", "linears"}
    assert {type(rule) for rule in rules.values()} == {RULES[name]}
    assert matrix_rules(OptimConfig()) == {}


# ---- the step of M as a step of W = D M C -------------------------------------------------------------------------

GROUPINGS = [kind for kind, record in OPERATORS.items() if record.groupings]  # 1 to 4, and 7
EVEN = [(12, 20, 4), (32, 64, 16), (64, 32, 16), (24, 24, 24), (9, 30, 3)]  # in, out, R
UNEVEN = [(77, 77, 44), (128, 352, 87), (96, 256, 80), (256, 96, 80)]


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
    step = D @ Muon(OptimConfig()).update((D.mT @ gradient @ C.mT)[None])[0] @ C
    return step, D @ torch.linalg.pinv(D) @ gradient @ torch.linalg.pinv(C) @ C


@pytest.fixture
def exact(monkeypatch):
    """U V^T of U S V^T in place of Newton-Schulz iterations."""

    def sign(matrices: torch.Tensor) -> torch.Tensor:
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        return left @ right

    monkeypatch.setattr(muon, "orthogonalize", sign)


@pytest.mark.parametrize("kind", GROUPINGS)
def test_an_operators_matrices_are_orthogonal_exactly_if_r_divides_both_widths(kind):
    """D^T D = out / R, and C C^T = in / R."""
    for width in range(1, 13):
        for size in range(1, 15):
            D, C = _operator_matrices(kind, width, width, size)
            for gram in (D.mT @ D, C @ C.mT):
                is_orthogonal = torch.equal(gram, width / size * torch.eye(size, dtype=torch.float64))
                assert is_orthogonal == (width % size == 0), (width, size)


@pytest.mark.parametrize("shape", EVEN)
@pytest.mark.parametrize("kind", GROUPINGS)
def test_with_even_groups_muons_step_of_m_is_steepest_for_w(exact, kind, shape):
    """The steepest step of W within the operator's space under the spectral norm is the sign of its gradient there."""
    in_features, out_features, size = shape
    step, gradient = _step_of_the_weight(kind, shape)
    norm = 0.2 * math.sqrt(in_features * out_features / size)
    left, values, right = torch.linalg.svd(gradient)
    assert torch.allclose(step, norm * left[:, :size] @ right[:size], rtol=0, atol=1e-10)
    assert float((gradient * step).sum()) == pytest.approx(norm * float(values.sum()), rel=1e-10)
    assert math.sqrt(float(step.square().mean())) == pytest.approx(0.2, rel=1e-10)


@pytest.mark.parametrize("shape", UNEVEN)
@pytest.mark.parametrize("kind", GROUPINGS)
def test_with_uneven_groups_it_is_so_only_approximately(exact, kind, shape):
    """It descends at 62 to 90 % of the steepest rate, with singular values that differ; the mean square is close."""
    in_features, out_features, size = shape
    step, gradient = _step_of_the_weight(kind, shape)
    values = torch.linalg.svdvals(step)[:size] / (0.2 * math.sqrt(in_features * out_features / size))
    steepest = float(torch.linalg.matrix_norm(step, ord=2) * torch.linalg.matrix_norm(gradient, ord="nuc"))
    assert 0.62 < float((gradient * step).sum()) / steepest < 0.9
    assert 0.4 < values[-1] < 0.9 < 1.1 < values[0] < 2
    wraps = OPERATORS[kind].groupings[0].startswith("wrapped")
    mean = math.sqrt(float(step.square().mean())) / 0.2
    assert (1.05 < mean < 1.3) if wraps else mean == pytest.approx(1, abs=0.01)
