"""Compiled kernels against torch in float64: exact for exact sums, and the same bits for any number of threads."""

import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch

from relora_mora.config.registry import OPERATORS
from relora_mora.kernels import cpu, cuda, grouping, ops
from relora_mora.kernels.grouping import Grouping, contiguous, interleaved, wrapped_interleaved
from relora_mora.kernels.ops import expand_add, group_sum
from tests.tools.each import each
from tests.tools.kernels import WITH_LIBRARY, compiled_only, integers, on_all_threads

GROUPINGS = [
    getattr(grouping, name) for name in sorted({name for record in OPERATORS.values() for name in record.groupings})
]
# (features, slots): from one repeat to more than have specialized code, divisible and not, more slots than features
SIZES = [(64, 16), (61, 16), (7, 19), (19, 19), (768, 443), (2048, 600), (131, 25), (200, 31), (5000, 2), (1, 1)]


def _contiguous_slot(feature: int, features: int, slots: int) -> int:
    per_slot, longer = divmod(features, slots)
    head = longer * (per_slot + 1)
    return feature // (per_slot + 1) if feature < head else longer + (feature - head) // per_slot


# (slot, feature) of every 1 in C, from the definitions in docs/method.md, independent of the pieces
DEFINITIONS = {
    "interleaved": lambda features, slots: [(i % slots, i) for i in range(features)],
    "wrapped_interleaved": lambda features, slots: [
        (i % slots, i % features) for i in range(-(-features // slots) * slots)
    ],
    "contiguous": lambda features, slots: [(_contiguous_slot(i, features, slots), i) for i in range(features)],
}


def _matrix(make, features: int, slots: int) -> torch.Tensor:
    """C [slots, features]"""
    C = torch.zeros(slots, features, dtype=torch.float64)
    for slot, feature in DEFINITIONS[make.__name__](features, slots):
        C[slot, feature] += 1
    return C


@each("make", GROUPINGS)
@each("features,slots", SIZES)
def test_sum_and_copy_agree_with_the_matrix_of_the_definition(make, features, slots):
    grouping = make(features, slots)
    C = _matrix(make, features, slots)
    x, y = integers(3, 2, features, dtype=torch.float64), integers(3, 2, slots, dtype=torch.float64)
    assert torch.equal(grouping.sum(x), x @ C.T)
    assert torch.equal(grouping.copy(y), y @ C)


def _assert_supported(tensor: torch.Tensor, grouping: Grouping) -> None:
    device = tensor.device.type
    if device != "cpu" and not ops.supports(tensor):
        pytest.skip(f"there are no kernels for {device}: {ops.describe(device)}")
    if device != "cpu" and len(grouping.pieces) > cuda.MOST_PIECES:
        pytest.skip(f"there are no kernels for {device} with {len(grouping.pieces)} pieces")
    assert ops.supports(tensor)


@compiled_only
@each("dtype", [torch.bfloat16, torch.float32])
@each("make", GROUPINGS)
@each("features,slots", SIZES)
def test_compiled_sum_rounds_once(make, features, slots, dtype, device):
    grouping, x = make(features, slots), integers(5, 7, features, dtype=dtype).to(device)
    _assert_supported(x, grouping)
    y = group_sum(x, grouping)
    assert y.dtype == dtype
    assert torch.equal(y, grouping.sum(x.double()).to(dtype))


@each("library", WITH_LIBRARY)
@each("make", GROUPINGS)
def test_sums_of_any_number_and_layout_of_rows(make, library, device, monkeypatch):
    monkeypatch.setattr(ops, "enabled", library)
    grouping = make(61, 16)
    wide = integers(6, 140).to(device)
    for x in (
        *(integers(*rows, 61).to(device) for rows in ((2, 3), (0,), ())),
        wide[:, 3:64],
        wide.T[:61].T,
        wide[:, 10:132:2],
        wide[:1, :61].expand(4, 61),
        wide[:, :122].view(6, 2, 61)[:, 1],
    ):
        y = group_sum(x, grouping)
        assert torch.equal(y, grouping.sum(x))
        assert y.is_contiguous()
    weight, M = integers(61, 61).to(device).T, integers(16, 16).to(device).T
    both = grouping, interleaved(61, 16)
    assert torch.equal(expand_add(weight, M, *both), expand_add(weight.contiguous(), M.contiguous(), *both))


@each("library", WITH_LIBRARY)
@each("dtype", [torch.bfloat16, torch.float32, torch.float64])
@each("outputs", [interleaved, contiguous])
@each("inputs", GROUPINGS)
@each("out_features,in_features,slots", [(61, 64, 16), (64, 130, 16), (7, 50, 19), (50, 7, 19), (300, 160, 37)])
def test_expand_add_rounds_once(inputs, outputs, out_features, in_features, slots, dtype, library, device, monkeypatch):
    monkeypatch.setattr(ops, "enabled", library)
    # torch rounds between the two slots of a feature, so the sums must be exact in its dtype
    rounds_once = ops.supports(torch.zeros(1, dtype=dtype, device=device))
    weight = integers(out_features, in_features, dtype=dtype, bound=255 if rounds_once else 60).to(device)
    M = integers(slots, slots, dtype=dtype, bound=255 if rounds_once else 60).to(device)
    columns, rows = inputs(in_features, slots), outputs(out_features, slots)
    exact = weight.double() + rows.copy(columns.copy(M.double()).mT).mT
    assert torch.equal(expand_add(weight, M, columns, rows), exact.to(dtype))


@compiled_only
@each("dtype", [torch.bfloat16, torch.float32])
@each("slots", [350, 200, 90, 40, 7])
@each("inputs,outputs", [(wrapped_interleaved, contiguous), (contiguous, interleaved)])
def test_threads_and_instruction_sets_change_no_bit(inputs, outputs, slots, dtype):
    x, M, weight = (torch.randn(*shape).to(dtype) for shape in ((1000, 350), (slots, slots), (800, 350)))
    columns, rows = inputs(350, slots), outputs(800, slots)
    (total, matrix), *others = on_all_threads(lambda: (group_sum(x, columns), expand_add(weight, M, columns, rows)))
    assert all(torch.equal(other, total) and torch.equal(sums, matrix) for other, sums in others)


@compiled_only
def test_nonfinite_values_stay_nonfinite():
    inf = float("inf")
    x = torch.tensor([[inf, 1.0, float("nan"), 2.0, inf, -inf, 3.4e38, 3.4e38]], dtype=torch.bfloat16)
    assert group_sum(x, contiguous(8, 4)).float().nan_to_num(7, 8, 9).tolist() == [[8, 7, 7, 8]]


def test_autograd_and_other_dtypes_use_torch():
    x = torch.randn(4, 10, requires_grad=True)
    assert not ops.supports(x)
    assert not ops.supports(x.detach().double())
    assert not ops.supports(torch.empty(2, 3, device="meta"))
    group_sum(x, interleaved(10, 4)).square().sum().backward()
    C = _matrix(interleaved, 10, 4).float()
    torch.testing.assert_close(x.grad, 2 * x.detach() @ C.T @ C)
    with mock.patch.object(ops, "enabled", False):
        assert not ops.supports(x.detach())
    assert ops.supports(x.detach()) == cpu.available()


def _both(x, weight, M):
    grouping = wrapped_interleaved(10, 4)
    return group_sum(x, grouping), expand_add(weight, M, grouping, interleaved(10, 4))


@pytest.mark.more
@pytest.mark.parametrize("library", WITH_LIBRARY)
def test_torch_compile_sees_through(library, monkeypatch):
    """The graph contains the kernels if there are some, and operations of torch otherwise."""
    monkeypatch.setattr(ops, "enabled", library)
    torch._dynamo.reset()
    arguments = integers(3, 10), integers(10, 10), integers(4, 4)
    graphs = []

    def backend(module, inputs):
        graphs.append({node.target for node in module.graph.nodes})
        return module

    compiled = torch.compile(_both, backend=backend, fullgraph=True)
    for a, b in zip(compiled(*arguments), _both(*arguments), strict=True):
        assert torch.equal(a, b)
    operators = {torch.ops.relora_mora.group_sum.default, torch.ops.relora_mora.expand_add.default}
    assert len(graphs) == 1
    assert graphs[0] & operators == (operators if library else set())


@pytest.mark.more
@compiled_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", GROUPINGS)
def test_operators_pass_torchs_checks(make, dtype):
    """They cover the schema, the fake implementation, and equal results when compiled, even with dynamic sizes."""
    operators = torch.ops.relora_mora
    inputs, outputs = make(61, 16), contiguous(50, 16)
    x = integers(3, 2, 61, dtype=dtype)
    torch.library.opcheck(operators.group_sum.default, (x, inputs.numbers))
    matrices = integers(50, 61, dtype=dtype), integers(16, 16, dtype=dtype)
    torch.library.opcheck(operators.expand_add.default, (*matrices, inputs.numbers, outputs.numbers))
    torch.library.opcheck(operators.rotary_add.default, matrices)
    logits = integers(7, 30, dtype=dtype)
    torch.library.opcheck(
        operators.cross_entropy_.default,
        (logits, torch.tensor([3, -100, 0, 1, 2, 29, 5]), torch.tensor(0.5), -100, True),
    )


@pytest.mark.more
@compiled_only
def test_kernels_use_only_torchs_threads():
    """Runs in a fresh process because other packages may load another OpenMP."""
    code = """
import re, torch
from pathlib import Path
from relora_mora.kernels.grouping import interleaved
from relora_mora.kernels.ops import group_sum
group_sum(torch.randn(4096, 64), interleaved(64, 5))
lines = Path("/proc/self/maps").read_text().splitlines()
print(len({line.split()[-1] for line in lines if re.search(r"/lib[gi]?omp\\b", line)}))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_an_unsuitable_library_is_not_used(monkeypatch, tmp_path):
    if shutil.which("gcc"):
        assert cpu.available(), ops.describe()
    cpu.load.cache_clear()
    try:
        for name, content, message in [
            ("SOURCE", b"/* newer */", "another version"),
            ("LIBRARY", b"no library", "cannot be loaded"),
        ]:
            if name == "SOURCE" and not cpu.LIBRARY.exists():
                continue
            (tmp_path / name).write_bytes(content)
            with monkeypatch.context() as patch:
                patch.setattr(cpu, name, tmp_path / name)
                patch.setattr(ops, "_DEVICES", ops.kernels_here())
                assert message in ops.describe()
                assert not cpu.available()
                assert not ops.supports(torch.zeros(2, 2))
            cpu.load.cache_clear()
    finally:
        cpu.load.cache_clear()
