"""Rows in 8 bits and their products, against float64 and exact integers."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relora_mora.kernels import ops
from relora_mora.kernels.grouping import contiguous, wrapped_interleaved
from relora_mora.kernels.ops import multiply_rows, quantize_rows
from tests.tools.each import each
from tests.tools.kernels import WITH_LIBRARY, compiled_only, on_all_threads

LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
KINDS = list(LARGEST)


def _rows(n: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(n + features)).to(dtype)


def _nearest(x: torch.Tensor, scales: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """The values of ``kind`` that are nearest to x / scales, ties to even, computed in float32 like the kernels."""
    inverse = scales.reciprocal().unsqueeze(1)
    return (x.float() * inverse).round().to(kind) if kind is torch.int8 else (x.float() * inverse).to(kind)


@each("library", WITH_LIBRARY)
@each("kind", KINDS)
@each("dtype", [torch.bfloat16, torch.float32])
@each("features", [1, 5, 768, 2731])
def test_rows_are_rounded_to_the_nearest_value(features, dtype, kind, library, monkeypatch):
    monkeypatch.setattr(ops, "enabled", library)
    x = _rows(9, features, dtype)
    columns = torch.rand(features, generator=torch.Generator().manual_seed(1)) + 0.5
    for factors in (None, columns):
        wide = x.float() if factors is None else x.float() * factors
        values, scales = quantize_rows(x, kind, factors, features + 3)
        assert values.dtype == kind
        torch.testing.assert_close(scales, wide.abs().amax(1) / LARGEST[kind], rtol=2**-23, atol=0)
        assert torch.equal(values[:, :features].float(), _nearest(wide, scales, kind).float())
        assert not values[:, features:].float().any()
        error = (values[:, :features].double() * scales.double().unsqueeze(1) - wide.double()).abs()
        step = scales.double().unsqueeze(1) * (1 if kind is torch.int8 else 32)  # e4m3 from 256 on
        assert (error <= step / 2 * (1 + 1e-5)).all()


@each("library", WITH_LIBRARY)
@each("kind", KINDS)
def test_unusual_rows(kind, library, monkeypatch):
    monkeypatch.setattr(ops, "enabled", library)
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x[1] = 1e-41  # denormal
    x[2, 7] = 1e30  # one outlier
    x[3] = torch.finfo(torch.float32).max
    x[4, 3] = float("nan")
    x[5, 3] = float("inf")
    x[6] = torch.tensor([-0.0] * 39 + [1.0])
    values, scales = quantize_rows(x, kind)
    dense = values.double() * scales.double().unsqueeze(1)
    assert not dense[0].any()
    assert dense[1].abs().max() <= 2e-38
    assert dense[2, 7] == pytest.approx(1e30)
    assert dense[2].count_nonzero() == 1
    torch.testing.assert_close(dense[3], x[3].double(), rtol=1e-6, atol=0)
    assert not scales[4:6].isfinite().any(), "a product with such a row is not finite either"
    assert dense[6].tolist() == [0.0] * 39 + [pytest.approx(1.0)]


@compiled_only
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_the_kernel_and_torch_give_the_same_bits(numbers, dtype):
    x = torch.tensor([numbers, numbers[::-1]]).to(dtype).nan_to_num()
    compiled = quantize_rows(x, torch.int8)
    with mock.patch.object(ops, "enabled", False):
        plain = quantize_rows(x, torch.int8)
    assert torch.equal(compiled[0], plain[0])
    assert torch.equal(compiled[1], plain[1])


@each("dtype", [torch.bfloat16, torch.float32])
@each("kind", KINDS)
@each("features,added", [(96, True), (96, False), (1030, True)])
def test_products_equal_float64_with_the_same_rounding(features, added, kind, dtype):
    tokens, inputs = 37, 64
    x, weight = _rows(tokens, inputs, dtype), _rows(features, inputs, torch.float32)
    values, rows = quantize_rows(x, kind)
    weights, columns = quantize_rows(weight, kind)
    grouping = wrapped_interleaved(features, 50)
    slots_of = _rows(tokens, 50, dtype) if added else None
    y = multiply_rows(values, rows, weights.mT, columns, dtype, grouping, slots_of)
    sums = values.double() @ weights.double().mT
    if kind is torch.int8:
        assert torch.equal(torch._int_mm(values, weights.mT), sums.to(torch.int32)), "sums are exact"
    expected = (sums.float() * rows.unsqueeze(1) * columns).double()
    if slots_of is not None:
        expected += grouping.copy(slots_of.double())
    if kind is torch.int8 and slots_of is None:
        assert torch.equal(y, expected.to(dtype))
    else:  # float32 sums of fp8, or one addition more
        spread = 2**-8 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(y.double(), expected, rtol=spread, atol=spread * float(expected.abs().mean()))


@compiled_only
def test_bits_do_not_depend_on_threads_or_instructions():
    x, weight = _rows(130, 700, torch.bfloat16), _rows(900, 700, torch.float32)
    weights, columns = quantize_rows(weight, torch.int8)

    def product() -> torch.Tensor:
        values, rows = quantize_rows(x, torch.int8)
        return multiply_rows(values, rows, weights.mT, columns, x.dtype, contiguous(900, 900))

    first, *others = on_all_threads(product)
    assert all(torch.equal(result, first) for result in others)
