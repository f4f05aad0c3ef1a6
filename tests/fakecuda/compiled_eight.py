"""Both ends of a product in 8 bits as Triton compiles them for A100, H100 and B200.

They are launched on a device that does nothing. Run by ``make test-fakecuda``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from relora_mora.kernels import quantize_rows, triton_launch
from relora_mora.kernels.ops import scale_rows
from tests.fakecuda.assembled import resources
from tests.fakecuda.compiled_groups import ARCHITECTURES, SHAPES, code_for, on_device, operator_of


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_launch, "_compiled", {})
    yield


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("features", [*sorted({shape[0] for shape in SHAPES}), 14_336])
def test_rows_do_not_spill(features: int, factors: bool, architecture: int, tmp_path: Path) -> None:
    columns = on_device(features, dtype=torch.float32) if factors else None
    quantize_rows(on_device(64, features), torch.int8, columns, -(-features // 16) * 16)
    used = resources(code_for(architecture), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mora_type", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_do_not_spill(shape: tuple[int, int], mora_type: int, architecture: int, tmp_path: Path) -> None:
    operator = operator_of(mora_type, shape)
    padded = -(-shape[1] // 16) * 16
    sums = on_device(64, padded, dtype=torch.int32)
    rows, columns = on_device(64, dtype=torch.float32), on_device(padded, dtype=torch.float32)
    slots_of = on_device(64, operator.square_size)
    scale_rows(sums, rows, columns, torch.bfloat16, operator.outputs, slots_of)
    used = resources(code_for(architecture), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0


def test_fp8_compiles_for_devices_that_have_it() -> None:
    values, _ = quantize_rows(on_device(64, 768), torch.float8_e4m3fn)
    assert values.dtype == torch.float8_e4m3fn
    assert code_for(90)
