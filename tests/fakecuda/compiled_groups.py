"""The sums and copies of GPUs as Triton compiles them for A100, H100 and B200, for the linears of real models.

They are launched on a device that does nothing. Run by ``make test-fakecuda``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from relora_mora.kernels import expand_add, group_sum, supports, triton_launch
from relora_mora.operators import GroupingOperator, make_operator, square_size
from tests.fakecuda.assembled import resources

ARCHITECTURES = [80, 90, 100]
RANK = 128
LINEARS = {
    "llama_250m": [(768, 768), (768, 2560), (2560, 768)],
    "llama_1_3b": [(2048, 2048), (2048, 5461), (5461, 2048)],
}
SHAPES = [shape for shapes in LINEARS.values() for shape in shapes]
THREADS = 128
REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_launch, "_compiled", {})
    yield


def on_device(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def operator_of(mora_type: int, shape: tuple[int, int]) -> GroupingOperator:
    operator = make_operator(mora_type, *shape, square_size(*shape, RANK))
    assert isinstance(operator, GroupingOperator)
    return operator


def code_for(architecture: int) -> dict[str, bytes | str]:
    """{kind of code: code} of the one kernel that was launched, as for another device"""
    [launched] = triton_launch._compiled.values()
    code: dict[str, bytes | str] = triton.compile(launched.src, target=GPUTarget("cuda", architecture, 32)).asm
    return code


def accesses(code: dict[str, bytes | str], kind: str) -> set[int]:
    """Bytes of each load (ld) or store (st) of a thread"""
    found = re.findall(rf"{kind}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)\b", str(code["ptx"]))
    return {int(count or 1) * int(bits) // 8 for count, bits in found}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mora_type", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_do_not_spill_and_are_stored_in_vectors(
    shape: tuple[int, int], mora_type: int, architecture: int, tmp_path: Path
) -> None:
    operator = operator_of(mora_type, shape)
    group_sum(on_device(64, shape[0]), operator.padded_inputs)
    code = code_for(architecture)
    assert accesses(code, "st") == {16}
    used = resources(code, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] * THREADS * 3 <= REGISTERS  # at least three programs at the same time


@pytest.mark.parametrize(
    "mora_type,shape,bytes_at_once",
    [
        (1, (768, 2560), {8}),  # R of 652: groups begin at multiples of four elements
        (1, (2560, 768), {8}),
        (1, (2048, 2048), {8, 16}),
        (1, (768, 768), {2}),  # R of 443
        (2, (768, 2560), {8, 16}),  # pairs of neighbours side by side
        (2, (2560, 768), {2, 16}),  # four neighbours side by side, and threes
        (2, (2048, 2048), {2, 16}),
        (1, (5461, 2048), {2}),  # no row but the first begins at a multiple of four bytes
    ],
)
def test_sums_load_in_vectors_if_groups_are_aligned(
    mora_type: int, shape: tuple[int, int], bytes_at_once: set[int]
) -> None:
    group_sum(on_device(64, shape[0]), operator_of(mora_type, shape).padded_inputs)
    assert accesses(code_for(90), "ld") == bytes_at_once


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mora_type", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_do_not_spill_and_are_read_and_written_in_vectors(
    shape: tuple[int, int], mora_type: int, architecture: int, tmp_path: Path
) -> None:
    operator = operator_of(mora_type, shape)
    size = operator.square_size
    expand_add(on_device(shape[1], shape[0]), on_device(size, size), operator.inputs, operator.outputs)
    code = code_for(architecture)
    whole = 16 if shape[0] % 8 == 0 else 2
    assert accesses(code, "st") == {whole}
    assert whole in accesses(code, "ld")
    used = resources(code, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_width_of_a_load_follows_from_the_pointer(dtype: torch.dtype) -> None:
    grouping = operator_of(1, (2048, 2048)).padded_inputs
    memory = on_device(65 * 2048, dtype=dtype)
    for offset in (0, 1, 16, 2048, 3):
        group_sum(memory[offset : offset + 64 * 2048].view(64, 2048), grouping)
    compiled = list(triton_launch._compiled.values())
    assert len(compiled) == 2  # 0, 16 and 2048 elements are multiples of 16 bytes
    loads = [accesses({"ptx": kernel.asm["ptx"]}, "ld") for kernel in compiled]
    assert max(loads[0]) == 16
    assert loads[1] == {dtype.itemsize}


def test_launches_of_one_shape_share_a_kernel() -> None:
    grouping = operator_of(2, (768, 768)).padded_inputs
    shapes = [(8, 32), (1, 64), (3, 5), (1, 1)]
    for shape in shapes:
        x = on_device(*shape, 768)
        assert supports(x)
        assert group_sum(x, grouping).shape == (*shape, 448)
    assert len(triton_launch._compiled) == 1
    assert group_sum(on_device(0, 768), grouping).shape == (0, 448)


def test_products_are_added_without_rounding_for_any_default_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    group_sum(on_device(8, 768), operator_of(1, (768, 768)).padded_inputs)
    [launched] = triton_launch._compiled.values()
    assert launched.metadata.enable_fp_fusion


def test_an_older_gpu_uses_the_operations_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    triton_launch.works_on.cache_clear()
    operator = operator_of(1, (768, 768))
    try:
        assert group_sum(on_device(4, 768), operator.padded_inputs).shape == (4, 448)
        assert expand_add(on_device(768, 768), on_device(443, 443), operator.inputs, operator.outputs).is_cuda
    finally:
        triton_launch.works_on.cache_clear()
    assert not triton_launch._compiled
