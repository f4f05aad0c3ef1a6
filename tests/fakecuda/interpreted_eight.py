"""Both ends of a GPU's product in 8 bits on CPU tensors, in Triton's interpreter: run by ``make test-fakecuda`` with
TRITON_INTERPRET=1.

The interpreter truncates float32 to bfloat16, and a GPU rounds it.
"""

from __future__ import annotations

import pytest
import torch

from relora_mora.kernels import reference, triton_eight
from relora_mora.kernels.grouping import contiguous, interleaved, wrapped_interleaved


def _rows(n: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that are not next to each other in memory."""
    generator = torch.Generator().manual_seed(n + features)
    return torch.randn(n, features + 3, generator=generator).to(dtype)[:, 2 : features + 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features,padded", [(1, 1), (5, 16), (768, 768), (2560, 2560), (5461, 5472), (16_400, 16_416)])
def test_rows_have_the_bits_of_torch(features: int, padded: int, dtype: torch.dtype) -> None:
    x = _rows(5, features, dtype)
    x[1] = 0
    for columns in (None, torch.rand(features, generator=torch.Generator().manual_seed(0))):
        values, scales = triton_eight.quantize_rows(x, torch.int8, columns, padded)
        expected = reference.quantize_rows(x, torch.int8, columns, padded)
        assert torch.equal(values, expected[0])
        assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_number_is_in_the_scale(bad: float) -> None:
    x = torch.ones(2, 40)
    x[1, 39] = bad
    _, scales = triton_eight.quantize_rows(x, torch.int8, None, 48)
    assert scales.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("make", [interleaved, wrapped_interleaved, contiguous])
@pytest.mark.parametrize("features,slots", [(61, 16), (7, 19), (768, 443), (5461, 980)])
def test_sums_are_scaled_and_copies_added(
    features: int, slots: int, make: type, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(features)
    grouping = make(features, slots)
    sums = torch.randint(-(2**20), 2**20, (9, features + 11), generator=generator, dtype=torch.int32)
    rows, columns = torch.rand(9, generator=generator), torch.rand(features + 11, generator=generator)
    for slots_of in (None, _rows(9, slots, dtype)):
        for factors in (None, columns):
            y = triton_eight.scale_rows(sums, rows, factors, slots_of, grouping, dtype)
            expected = reference.scale_rows(sums, rows, factors, torch.float64, grouping, slots_of)
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_no_rows() -> None:
    values, scales = triton_eight.quantize_rows(torch.empty(0, 7), torch.int8, None, 16)
    assert values.shape == (0, 16)
    y = triton_eight.scale_rows(
        torch.empty(0, 16, dtype=torch.int32), scales, None, None, contiguous(7, 7), torch.float32
    )
    assert y.shape == (0, 7)
