"""The kernels of GPUs as Triton compiles them for A100, H100 and B200, for the linears and vocabularies of real models.

They are launched on a device that does nothing. Run by ``make test-fakecuda``.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from relora_mora.kernels import triton_launch
from relora_mora.kernels.ops import cross_entropy_, expand_add, group_sum, quantize_rows, scale_rows, supports
from relora_mora.kernels.triton_loss import _WARPS
from relora_mora.operators import GroupingOperator, make_operator, square_size

ARCHITECTURES = [80, 90, 100]
RANK = 128
LINEARS = {
    "llama_250m": [(768, 768), (768, 2560), (2560, 768)],
    "llama_1_3b": [(2048, 2048), (2048, 5461), (5461, 2048)],
}
SHAPES = [shape for shapes in LINEARS.values() for shape in shapes]
THREADS = 128
REGISTERS = 65536  # of a multiprocessor

Code = dict[str, bytes | str]


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_compiled", {})


def on_device(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def operator_of(mora_type: int, shape: tuple[int, int]) -> GroupingOperator:
    operator = make_operator(mora_type, *shape, square_size(*shape, RANK))
    assert isinstance(operator, GroupingOperator)
    return operator


def code_for(architecture: int, **options: int) -> Code:
    """{kind of code: code} of the one kernel that was launched, as for another device"""
    [launched] = triton_launch._compiled.values()
    target = GPUTarget("cuda", architecture, 32)
    code: Code = triton.compile(launched.src, target=target, options=options or None).asm
    return code


def accesses(code: Code, kind: str) -> set[int]:
    """Bytes of each load (ld) or store (st) of a thread"""
    found = re.findall(rf"{kind}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)\b", str(code["ptx"]))
    return {int(count or 1) * int(bits) // 8 for count, bits in found}


def registers(code: Code, folder: Path) -> int:
    """Those of a thread, as NVIDIA's assembler noted them; none may be spilled."""
    file = folder / "kernel.cubin"
    file.write_bytes(bytes(code["cubin"]))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    assert used["STACK"] == used["LOCAL"] == 0
    return used["REG"]


# ---- sums and copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mora_type", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_do_not_spill_and_are_stored_in_vectors(
    shape: tuple[int, int], mora_type: int, architecture: int, tmp_path: Path
) -> None:
    group_sum(on_device(64, shape[0]), operator_of(mora_type, shape).padded_inputs)
    code = code_for(architecture)
    assert accesses(code, "st") == {16}
    assert registers(code, tmp_path) * THREADS * 3 <= REGISTERS  # at least three programs at the same time


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
    registers(code, tmp_path)


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
    for shape in [(8, 32), (1, 64), (3, 5), (1, 1)]:
        x = on_device(*shape, 768)
        assert supports(x)
        assert group_sum(x, grouping).shape == (*shape, 448)
    assert len(triton_launch._compiled) == 1
    assert group_sum(on_device(0, 768), grouping).shape == (0, 448)


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


# ---- both ends of a product in 8 bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("features", [*sorted({shape[0] for shape in SHAPES}), 14_336])
def test_rows_in_8_bits_do_not_spill(features: int, factors: bool, architecture: int, tmp_path: Path) -> None:
    columns = on_device(features, dtype=torch.float32) if factors else None
    quantize_rows(on_device(64, features), torch.int8, columns, -(-features // 16) * 16)
    registers(code_for(architecture), tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mora_type", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_sums_do_not_spill(shape: tuple[int, int], mora_type: int, architecture: int, tmp_path: Path) -> None:
    operator = operator_of(mora_type, shape)
    padded = -(-shape[1] // 16) * 16
    sums = on_device(64, padded, dtype=torch.int32)
    rows, columns = on_device(64, dtype=torch.float32), on_device(padded, dtype=torch.float32)
    slots_of = on_device(64, operator.square_size)
    scale_rows(sums, rows, columns, torch.bfloat16, operator.outputs, slots_of)
    registers(code_for(architecture), tmp_path)


def test_fp8_compiles_for_devices_that_have_it() -> None:
    values, _ = quantize_rows(on_device(64, 768), torch.float8_e4m3fn)
    assert values.dtype == torch.float8_e4m3fn
    assert code_for(90)


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("vocabulary,stride", [(32000, 32000), (50257, 50272)])
def test_the_loss_reads_and_writes_in_vectors_and_nothing_spills(
    vocabulary: int, stride: int, architecture: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    logits = on_device(3, stride, dtype=dtype)[:, :vocabulary]
    labels = on_device(3, dtype=torch.long)
    scale = torch.empty((), device="cuda")
    for _ in range(2):  # the second launch compiles nothing
        _, gradient = cross_entropy_(logits, labels, ignore=-100, scale=scale, gradient=True)
        assert gradient is logits
    code = code_for(architecture, num_warps=_WARPS)
    vectors = re.findall(r"(ld|st)\.global\S*\.v4\.b32\b", str(code["ptx"]))
    single = re.findall(r"(ld|st)\.global(?!\S*\.v\d)\S*\.(b16|b32)\b", str(code["ptx"]))
    assert vectors.count("st") >= 2
    assert vectors.count("ld") >= 4
    used = registers(code, tmp_path)
    if vocabulary == 32000:
        assert len(single) == 4  # the label's logit, the scale; and twice a loss
        assert used * 32 * _WARPS * 2 <= REGISTERS  # two rows at the same time on a multiprocessor
