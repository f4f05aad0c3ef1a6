"""The sums and copies of GPUs on CPU tensors, in Triton's interpreter: run by ``make test-fakecuda`` with
TRITON_INTERPRET=1.

The interpreter truncates float32 to bfloat16, and a GPU rounds it; values that are exact in bfloat16 do not change.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from relora_mora.adapters.mora import MoRALinear
from relora_mora.config.schema import MethodConfig
from relora_mora.kernels import ops, reference, triton_groups
from relora_mora.kernels.grouping import Grouping, contiguous, interleaved, wrapped_interleaved
from tests.tools import kernels as shared

integers = functools.partial(shared.integers, bound=100)
GROUPINGS = [interleaved, wrapped_interleaved, contiguous]
# whole and broken groups, slots than features, powers of two, more than a block of slots and of repeats
SIZES = [
    (64, 16),
    (61, 16),
    (7, 19),
    (5, 5),
    (1, 1),
    (9, 1),
    (130, 16),
    (768, 443),
    (2560, 652),
    (2048, 724),
    (5461, 980),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", GROUPINGS)
@pytest.mark.parametrize("features,slots", SIZES)
def test_sums_agree_with_float64(
    features: int, slots: int, make: Callable[[int, int], Grouping], dtype: torch.dtype
) -> None:
    for grouping in (make(features, slots), make(features, slots).padded(16)):
        x = integers(3, 3, features, dtype=dtype)
        y = triton_groups.group_sum(x, grouping)
        exact = grouping.sum(x.double())
        assert y.shape == (3, 3, grouping.slots)
        assert y.dtype == dtype
        # one rounding: at most a unit in the last of 8 places
        torch.testing.assert_close(y.double(), exact, rtol=2**-7 if dtype is torch.bfloat16 else 0, atol=0)
        assert not y[..., slots:].any()


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 8, 17])
def test_any_number_of_rows(rows: int) -> None:
    for grouping in (contiguous(50, 12), interleaved(50, 12), contiguous(50, 50)):
        x = integers(rows, 50)
        assert torch.equal(triton_groups.group_sum(x, grouping), grouping.sum(x))


def test_any_layout_is_read_as_it_is() -> None:
    grouping = contiguous(40, 12)
    base = integers(6, 90)
    for x in (
        base[:, 3:43],
        base.T[:40].T,
        base[:, 10:90:2],
        base[:1, :40].expand(4, 40),
        base[:, :80].view(6, 2, 40)[:, 1],
        base[:, None, :40].as_strided((6, 1, 40), (90, 7, 1)),
        base[0, :40],
    ):
        assert torch.equal(triton_groups.group_sum(x, grouping), grouping.sum(x))
    weight = integers(40, 40).T
    square = integers(12, 12).T
    expected = reference.expand_add(weight, square, grouping, grouping)
    assert torch.equal(triton_groups.expand_add(weight, square, grouping, grouping), expected)


def test_rows_may_have_any_stride() -> None:
    far = 2**31 + 16
    memory = torch.empty(far + 64, dtype=torch.bfloat16)  # most of it is never touched
    x = memory.as_strided((2, 64), (far, 1))
    x.copy_(integers(2, 64))
    assert torch.equal(triton_groups.group_sum(x, interleaved(64, 32)), interleaved(64, 32).sum(x))


def test_nonfinite_values_stay_nonfinite() -> None:
    x = torch.tensor([[float("inf"), 1.0, float("nan"), 2.0, float("inf"), float("-inf"), 3e38, 3e38]])
    y = triton_groups.group_sum(x, contiguous(8, 4))
    assert y.nan_to_num(7, 8, 9).tolist() == [[8, 7, 7, 8]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [interleaved, contiguous])
@pytest.mark.parametrize("inputs", GROUPINGS)
@pytest.mark.parametrize(
    "out_features,in_features,slots",
    [(61, 64, 16), (7, 50, 19), (50, 7, 19), (60, 560, 37), (20, 5461, 980), (1387, 24, 17)],
)
def test_a_weight_and_its_delta_are_added_as_in_float64(
    out_features: int,
    in_features: int,
    slots: int,
    inputs: Callable[[int, int], Grouping],
    outputs: Callable[[int, int], Grouping],
    dtype: torch.dtype,
) -> None:
    weight = integers(out_features, in_features, dtype=dtype)
    square = integers(slots, slots, dtype=dtype)
    columns = inputs(in_features, slots)
    rows = outputs(out_features, slots)
    exact = weight.double() + rows.copy(columns.copy(square.double()).mT).mT
    result = triton_groups.expand_add(weight, square, columns, rows)
    torch.testing.assert_close(result.double(), exact, rtol=2**-7 if dtype is torch.bfloat16 else 0, atol=0)


@pytest.fixture
def kernels_of_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def group_sum(x: Tensor, numbers: list[int]) -> Tensor:
        return triton_groups.group_sum(x, Grouping.of_numbers(numbers))

    def expand_add(weight: Tensor, square: Tensor, inputs: list[int], outputs: list[int], after: Tensor) -> Tensor:
        return triton_groups.expand_add(weight, square, Grouping.of_numbers(inputs), Grouping.of_numbers(outputs))

    monkeypatch.setattr(ops, "_DEVICES", {"cpu": (torch.float32,)})
    monkeypatch.setattr(ops, "_group_sum", group_sum)
    monkeypatch.setattr(ops, "_expand_add", expand_add)
    yield


@pytest.mark.usefixtures("kernels_of_gpus")
@pytest.mark.parametrize("mora_type", [1, 2, 3, 4])
def test_a_layer_with_these_kernels_has_the_gradients_of_the_textbook_form(mora_type: int) -> None:
    torch.manual_seed(0)
    method = MethodConfig(name="mora", square_size=19, operators=[mora_type], form="merged")
    layer = MoRALinear(nn.Linear(50, 61, bias=False), method, torch.Generator())
    nn.init.normal_(layer.mora_M, std=0.3)
    textbook = copy.deepcopy(layer)
    textbook.form = "decoupled"
    layer.operator = copy.copy(layer.operator)
    layer.operator.inputs = layer.operator.padded_inputs  # as on a GPU
    layer.operator.outputs = layer.operator.padded_outputs
    results = []
    for form in (layer, textbook):
        x = torch.randn(3, 5, 50, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = form(x)
        y.square().sum().backward()
        assert form.mora_M.grad is not None
        assert form.mora_M.grad.shape == (19, 19)
        results.append((y, x.grad, form.mora_M.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
