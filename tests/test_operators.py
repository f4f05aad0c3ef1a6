"""Operators against the released numbers and against explicit matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relora_mora.config.registry import OPERATORS
from relora_mora.operators import MORA_TYPES, GroupingOperator, Operator, make_operator, square_size
from tests.tools.each import each
from tests.tools.shared import SHARED, needs_shared

RELEASED = {1, 2, 3, 4, 6}
SHAPES = [(7, 5, 3), (5, 9, 12), (3, 4, 8), (16, 6, 6), (6, 16, 6), (10, 10, 10), (13, 29, 4), (1, 1, 2), (31, 7, 14)]


def size_for(mora_type: int, size: int) -> int:
    """The next even size if the operator needs one."""
    return size + (size % 2 if OPERATORS[mora_type].even_size else 0)


CASES = [(kind, inputs, outputs, size_for(kind, size)) for kind in MORA_TYPES for inputs, outputs, size in SHAPES]


def _columns(linear, width: int) -> torch.Tensor:
    """The matrix of a linear map, computed from the unit vectors."""
    return torch.stack([linear(unit).flatten() for unit in torch.eye(width, dtype=torch.float64)], -1)


@needs_shared
def test_agrees_with_the_released_code():
    golden = np.load(SHARED / "golden" / "mora_operators.npz")
    cases = sorted({key.split("/")[0] for key in golden.files})
    assert {int(golden[f"{case}/type"]) for case in cases} == RELEASED
    for case in cases:
        field = {
            name: golden[f"{case}/{name}"]
            for name in ("type", "in_features", "out_features", "r_hat", "M", "x", "y", "delta")
        }
        op = make_operator(*(int(field[name]) for name in ("type", "in_features", "out_features", "r_hat")))
        M, x = torch.from_numpy(field["M"]), torch.from_numpy(field["x"])
        assert (op.decompress(op.compress(x) @ M.T) - torch.from_numpy(field["y"])).abs().max() <= 1e-12, case
        assert (op.delta(M) - torch.from_numpy(field["delta"])).abs().max() <= 1e-12, case


@each("mora_type,inputs,outputs,size", CASES)
def test_forward_gradient_and_transpose_follow_from_explicit_matrices(mora_type, inputs, outputs, size):
    torch.manual_seed(1)
    op = make_operator(mora_type, inputs, outputs, size)
    M = torch.randn(size, size, dtype=torch.float64, requires_grad=True)
    x, dy = torch.randn(4, inputs, dtype=torch.float64), torch.randn(4, outputs, dtype=torch.float64)
    C = _columns(op.compress, inputs)  # [B * R, in], B = 1 for the groupings
    D_transposed = _columns(op.decompress_transposed, outputs)
    blocks = C.shape[0] // size
    explicit = D_transposed.T @ torch.block_diag(*[M] * blocks) @ C
    torch.testing.assert_close(op.delta(M), explicit, rtol=0, atol=1e-12)
    torch.testing.assert_close(op.decompress(op.compress(x) @ M.T), x @ explicit.T, rtol=0, atol=1e-12)
    (expected,) = torch.autograd.grad((x @ explicit.T * dy).sum(), M)
    dM = op.square_gradient(op.compress(x), dy)
    torch.testing.assert_close(dM, expected, rtol=0, atol=1e-12)
    assert dM.is_contiguous()
    shape = op.compress(x[0]).shape
    D = _columns(lambda unit: op.decompress(unit.reshape(shape)), blocks * size)
    assert torch.equal(D, D_transposed.T)
    A, B = op.factors(M)
    assert (A.shape, B.shape) == ((blocks * size, inputs), (outputs, blocks * size))
    exact = size <= inputs and isinstance(op, GroupingOperator)  # otherwise sums in another order round differently
    assert (B @ A - op.delta(M)).abs().max() <= (0 if exact else 1e-12)


@each("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@each("mora_type", MORA_TYPES)
@each("inputs,outputs,size", [(13, 29, 4), (24, 40, 13), (768, 2048, 443)])
def test_an_operator_in_the_types_of_training_agrees_with_float64(
    mora_type, inputs, outputs, size, dtype, tolerance, device
):
    size = size_for(mora_type, size)
    op = make_operator(mora_type, inputs, outputs, size)
    draw = torch.Generator().manual_seed(0)
    shapes = ((5, inputs), (size, size), (5, outputs), (outputs, inputs))
    x, M, dy, weight = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    results = []
    for target, kind in ((device, dtype), (torch.device("cpu"), torch.float64)):
        moved = [tensor.to(target, kind) for tensor in (x, M, dy, weight)]
        compressed = op.compress(moved[0])
        computed = (
            compressed,
            op.decompress(compressed),
            op.decompress_transposed(moved[2]),
            op.delta(moved[1]),
            op.add_delta(moved[3], moved[1]),
        )
        assert {(tensor.device.type, tensor.dtype) for tensor in computed} == {(target.type, kind)}
        results.append([tensor.cpu().double() for tensor in computed])
    for actual, expected in zip(*results, strict=True):
        assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


@each("mora_type,inputs,outputs,size", CASES)
def test_the_core_has_the_singular_values_of_delta(mora_type, inputs, outputs, size):
    op = make_operator(mora_type, inputs, outputs, size)
    M = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    core = op.core(M)
    assert max(core.shape) <= size or type(op).core is Operator.core
    actual, expected = torch.linalg.svdvals(core), torch.linalg.svdvals(op.delta(M))
    longest = max(len(actual), len(expected))
    pad = torch.nn.functional.pad
    torch.testing.assert_close(
        pad(actual, (0, longest - len(actual))), pad(expected, (0, longest - len(expected))), rtol=0, atol=1e-12
    )


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 512))
def test_the_square_never_exceeds_loras_budget(inputs, outputs, rank):
    size = square_size(inputs, outputs, rank)
    assert size**2 <= rank * (inputs + outputs) < (size + 1) ** 2


def test_impossible_operators_are_refused():
    with pytest.raises(ValueError, match="even size, got 5"):
        make_operator(6, 8, 8, 5)
    with pytest.raises(ValueError, match=f"one of {', '.join(map(str, MORA_TYPES))}, got 5"):
        make_operator(5, 8, 8, 4)


def _matrices(op) -> tuple[torch.Tensor, torch.Tensor]:
    """C [R, in] and D [out, R]"""
    return _columns(op.compress, op.in_features), _columns(op.decompress, op.square_size)


@each("before,after", [(1, 2), (2, 3), (3, 4)])
def test_a_carried_moment_belongs_to_the_smallest_gradient_of_the_weight(before, after):
    """Pseudo-inverses give the weight gradient of least norm that explains M's gradient."""
    old = make_operator(before, 24, 40, 12)  # 12 divides 24: type 1 does not wrap
    new = make_operator(after, 24, 40, 12)
    moment = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (C, D), (C2, D2) = _matrices(old), _matrices(new)
    gradient = torch.linalg.pinv(D.T) @ moment @ torch.linalg.pinv(C.T)
    assert torch.allclose(D.T @ gradient @ C.T, moment)
    assert torch.allclose(new.carry(moment, old), D2.T @ gradient @ C2.T, rtol=1e-12, atol=1e-12)


@each("kind", [2, 3])
@each("inputs,outputs,size", SHAPES)
def test_the_same_operator_leaves_a_moment_unchanged(kind, inputs, outputs, size):
    op = make_operator(kind, inputs, outputs, size)
    rows, columns = (groups.sum(torch.ones(groups.features)) > 0 for groups in (op.outputs, op.inputs))
    # a slot without features has no gradient
    moment = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * rows[:, None] * columns
    assert torch.allclose(op.carry(moment, op), moment, atol=1e-6)


@each("before,after", [(1, 2), (2, 1), (4, 3)])
@each("inputs,outputs,size", SHAPES)
def test_carried_second_moments_are_no_less_than_the_squares_of_the_first(before, after, inputs, outputs, size):
    """Cauchy-Schwarz bounds it by the sum of the shares of a slot, so no step is many times the rate."""
    old, new = make_operator(before, inputs, outputs, size), make_operator(after, inputs, outputs, size)
    first = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    shares = new.carry(torch.ones(size, size), old)
    assert (new.carry(first, old).square() <= shares * new.carry(first.square(), old) + 1e-5).all()
