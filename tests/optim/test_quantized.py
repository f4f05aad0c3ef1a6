"""8-bit AdamW on whole matrices, compared with its formulas in float64 and with AdamW."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.benchmark.measure import ByteTracker
from relora_mora.config.optim import OptimConfig
from relora_mora.optim import quantized
from relora_mora.optim.quantized import AdamW8bit
from relora_mora.optim.rules import MatrixState
from tests.tools.each import each

GOLDEN = (1 + math.sqrt(5)) / 2  # its fractional part is 1 / GOLDEN


def _rule(**settings: Any) -> AdamW8bit:
    return AdamW8bit(OptimConfig(**{"betas": (0.8, 0.9), "eps": 1e-6, **settings}))


def _state(rule: AdamW8bit, shape: tuple[int, int]) -> MatrixState:
    return MatrixState(0, rule.state_shapes(*shape))


def _draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _reference(
    gradient: Tensor, before: dict[str, Tensor], block: int, step: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """From a gradient and the state before it: the update, the exact codes before rounding, and the scales."""
    kept = {key: value.double() for key, value in before.items()}
    first = kept["exp_avg_codes"] * kept["exp_avg_codes"].abs() * kept["exp_avg_scales"].repeat_interleave(block, dim=1)
    second = (kept["exp_avg_sq_codes"] * kept["exp_avg_sq_scales"].repeat_interleave(block, dim=1)) ** 2
    first = 0.8 * first + 0.2 * gradient.double()
    second = 0.9 * second + 0.1 * gradient.double() ** 2
    update = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)) ** 0.5 + 1e-6)
    exact, scales = {}, {}
    for key, values, largest in (("exp_avg", first, 127**2), ("exp_avg_sq", second**0.5, 255)):
        blocks = values.reshape(len(values), -1, block)
        scales[key] = blocks.abs().amax(dim=2) / largest
        exact[key] = (blocks / scales[key][:, :, None]).reshape(values.shape)
    exact["exp_avg"] = exact["exp_avg"].sign() * exact["exp_avg"].abs() ** 0.5
    return update, exact, scales


@each("shape,block", [((7, 24), 24), ((5, 600), 200), ((3, 37), 37), ((4, 512), 256), ((2, 5461), 127)])
def test_a_step_follows_the_formulas(shape, block):
    rule = _rule()
    state = _state(rule, shape)
    sizes = 10 ** _draw(shape, 1).clamp(-1.5, 1.5)
    for step in range(1, 8):
        before = {key: value.clone() for key, value in state.items()}
        gradient = sizes * _draw(shape, 1 + step)
        update, exact, scales = _reference(gradient, before, block, step)
        assert torch.allclose(rule.update(gradient, state).double(), update, rtol=2e-5, atol=1e-6)
        assert int(state["updates"]) == step
        for key, smallest in (("exp_avg", 0), ("exp_avg_sq", 1)):
            assert torch.allclose(state[f"{key}_scales"].double(), scales[key], rtol=1e-5, atol=0)
            shifted = exact[key].abs() + step * GOLDEN % 1
            codes = state[f"{key}_codes"].double()
            expected = exact[key].sign() * shifted.floor().clamp(min=smallest)
            is_at_border = (shifted - shifted.round()).abs() < 1e-3  # float32 may fall on the other side
            assert torch.equal(codes[~is_at_border], expected[~is_at_border])
            assert (codes - expected).abs().max() <= 1


@pytest.mark.more
@pytest.mark.parametrize("betas,drift", [((0.9, 0.95), 0.03), ((0.9, 0.999), 0.08)])
def test_updates_stay_close_to_adam(betas, drift):
    """Over elements that differ by up to a factor of 30 within a block."""
    shape, steps = (16, 256), 400
    rule = _rule(betas=betas)
    state = _state(rule, shape)
    sizes = 30 ** -torch.rand(shape, generator=torch.Generator().manual_seed(0))
    gradients = [sizes * (0.3 + _draw(shape, step)) for step in range(steps)]
    ours, theirs = torch.zeros(shape), torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    adam = torch.optim.Adam([theirs], lr=1.0, betas=betas, eps=1e-6)
    for gradient in gradients:
        before, theirs.grad = theirs.detach().clone(), gradient.double()
        adam.step()
        found, expected = -rule.update(gradient.clone(), state), theirs.detach() - before
        ours += found
        assert (found - expected).norm() < 0.12 * expected.norm()
    assert (ours - theirs).norm() < drift * theirs.norm()


def test_no_element_makes_a_much_larger_step_than_the_largest_of_adam():
    """Elements are up to 1e8 times smaller than the largest of their block, and gradients come and go."""
    betas = (0.9, 0.95)
    rule = _rule(betas=betas, eps=1e-20)
    state = _state(rule, (64, 256))
    sizes = 10 ** (-8 * torch.rand(64, 256, generator=torch.Generator().manual_seed(3)))
    largest = 0.0
    for step in range(200):
        rare = torch.rand(64, 256, generator=torch.Generator().manual_seed(step)) < 0.2 + 0.6 * (step % 7 == 0)
        largest = max(largest, float(rule.update(sizes * rare * _draw((64, 256), step), state).abs().max()))
    # Cauchy and Schwarz: the largest step of Adam, after its bias correction
    most = (1 - betas[0]) / math.sqrt((1 - betas[1]) * (1 - betas[0] ** 2 / betas[1]))
    assert largest < 2 * most


def test_without_a_gradient_there_is_no_step():
    rule = _rule()
    state = _state(rule, (3, 20))
    for _ in range(3):
        assert not rule.update(torch.zeros(3, 20), state).any()
    update = rule.update(_draw((3, 20), 0), state)
    assert update.isfinite().all()
    assert update.any(dim=1).all()


@each("rows", [1, 3, 10])
def test_rows_that_are_decoded_together_do_not_matter(monkeypatch, rows):
    rule = _rule()
    states = [_state(rule, (10, 48)) for _ in range(2)]
    for step in range(4):
        gradient = _draw((10, 48), step)
        monkeypatch.setattr(quantized, "AT_ONCE", rows * 48)
        found = rule.update(gradient.clone(), states[0])
        monkeypatch.undo()
        assert torch.equal(found, rule.update(gradient, states[1]))
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@each("shape", [(64, 768), (2000, 768)])
def test_workspace_bytes_are_what_an_update_allocates(shape):
    rule = _rule()
    state = _state(rule, shape)
    gradient = torch.randn(shape)
    held = [gradient, *state.values()]
    with ByteTracker(held, gradient.device, 1) as tracker:
        rule.update(gradient, state)
    assert tracker.most - sum(tensor.nbytes for tensor in held) == pytest.approx(
        rule.workspace_bytes(*shape, on_gpu=False), rel=0.03
    )
