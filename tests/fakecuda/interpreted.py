"""The kernels of GPUs on CPU tensors, in Triton's interpreter: run by ``make test-fakecuda`` with TRITON_INTERPRET=1.

The interpreter truncates float32 to bfloat16, and a GPU rounds it; values that are exact in bfloat16 do not change.
"""

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.adapters.mora import MoRALinear
from relora_mora.config.schema import MethodConfig
from relora_mora.kernels import ops, reference, triton_eight, triton_groups, triton_loss
from relora_mora.kernels.grouping import Grouping, contiguous, interleaved, wrapped_interleaved
from relora_mora.model import loss as model
from relora_mora.model.loss import chunked_cross_entropy
from tests.kernels.test_kernels import (
    test_nonfinite_values_stay_nonfinite,
    test_sums_of_any_number_and_layout_of_rows,
)
from tests.model.test_loss import test_a_nonfinite_logit_makes_the_result_nonfinite
from tests.tools import kernels as shared

integers = functools.partial(shared.integers, bound=100)
GROUPINGS = [interleaved, wrapped_interleaved, contiguous]
# whole and broken groups, slots than features, powers of two, more than a block of slots and of repeats
SIZES = [(64, 16), (61, 16), (7, 19), (5, 5), (1, 1), (9, 1), (130, 16), (768, 443), (2560, 652), (5461, 980)]


@pytest.fixture(autouse=True)
def kernels_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of those of CPUs, also in the tests of these."""

    def group_sum(x: Tensor, numbers: list[int]) -> Tensor:
        return triton_groups.group_sum(x, Grouping.of_numbers(numbers))

    def expand_add(weight: Tensor, square: Tensor, inputs: list[int], outputs: list[int], after: Tensor) -> Tensor:
        return triton_groups.expand_add(weight, square, Grouping.of_numbers(inputs), Grouping.of_numbers(outputs))

    monkeypatch.setattr(ops, "_DEVICES", {"cpu": (torch.float32, torch.bfloat16)})
    monkeypatch.setattr(ops, "_group_sum", group_sum)
    monkeypatch.setattr(ops, "_expand_add", expand_add)
    monkeypatch.setattr(ops, "_cross_entropy_", triton_loss.cross_entropy_)


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


def test_rows_may_have_any_stride() -> None:
    far = 2**31 + 16
    memory = torch.empty(far + 64, dtype=torch.bfloat16)  # most of it is never touched
    x = memory.as_strided((2, 64), (far, 1))
    x.copy_(integers(2, 64))
    assert torch.equal(triton_groups.group_sum(x, interleaved(64, 32)), interleaved(64, 32).sum(x))


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


# ---- both ends of a product in 8 bits -------------------------------------------------------------------------------


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
@pytest.mark.parametrize("make", GROUPINGS)
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


# ---- the loss -------------------------------------------------------------------------------------------------------

SCALE = torch.tensor(0.25)


def case(vocabulary: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """logits [7, V], whose rows are longer than V, and labels [7]"""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = spread * torch.randn(7, vocabulary + 13, generator=generator)
    labels = torch.randint(0, vocabulary, (7,), generator=generator)
    labels[::3] = -100
    return logits.to(dtype)[:, 5 : 5 + vocabulary], labels


@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("vocabulary", [1, 5, 31, 8192, 32000, 50257])
def test_losses_and_gradients_agree_with_float64(
    vocabulary: int, dtype: torch.dtype, tolerance: float, spread: float
) -> None:
    logits, labels = case(vocabulary, dtype, spread)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, labels, ignore_index=-100, reduction="none")
    gradient = torch.autograd.grad(expected.sum() * SCALE, wide)[0]
    quiet = triton_loss.cross_entropy_(logits, labels, SCALE, -100, False)
    losses = triton_loss.cross_entropy_(logits, labels, SCALE, -100, True)
    assert torch.equal(quiet, losses)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=tolerance, atol=1e-8)


def test_a_label_outside_the_vocabulary_has_no_loss() -> None:
    labels = torch.tensor([3, 21, -1, -100])
    losses = triton_loss.cross_entropy_(torch.zeros(4, 21), labels, SCALE, -100, True)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert losses[3] == 0


@pytest.mark.parametrize("out", [slice(0, 8192), slice(8192, 8201)])
def test_tokens_that_are_ruled_out_have_no_gradient(out: slice) -> None:
    logits = torch.zeros(1, 8201)
    logits[0, out] = float("-inf")
    label = 8200 if out.start == 0 else 3
    loss = triton_loss.cross_entropy_(logits, torch.tensor([label]), torch.tensor(1.0), -100, True)
    left = 8201 - (out.stop - out.start)
    assert loss.item() == pytest.approx(torch.tensor(left).log().item(), rel=1e-6)
    assert not logits[0, out].any()
    assert logits[0, label].item() == pytest.approx(1 / left - 1, rel=1e-6)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor says that it is on a GPU; products with sums in float32, which CPUs have not, are computed so."""
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
    library.impl("addmm.dtype_out", _addmm, "CPU")
    yield
    library._destroy()


def _addmm(
    total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, beta: int = 1, alpha: int = 1, *, out: Tensor
) -> Tensor:
    assert out.dtype == dtype == torch.float32
    assert out.data_ptr() == total.data_ptr()
    return out.addmm_(a.to(dtype), b.to(dtype))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("chunk", [3, 7, 100])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_head_and_loss_agree_with_plain_cross_entropy(
    dtype: torch.dtype, tolerance: float, chunk: int, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "ADDS_TO_FLOAT32", adds)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 10, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype)
    labels = torch.randint(0, 11, (2, 10))
    labels[0, :4] = -100
    results = []
    for loss_of in (
        lambda h, w: chunked_cross_entropy(h, w, labels, 16.0, chunk_tokens=chunk),
        lambda h, w: F.cross_entropy((h @ w.T).flatten(0, 1).float(), labels.flatten(), ignore_index=-100),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = loss_of(h, w)
        (loss * 3).backward()
        assert h.grad.dtype == w.grad.dtype == dtype
        results.append((loss.double(), h.grad.double(), w.grad.double()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_second_backward_is_refused() -> None:
    """They are scaled in place, so a second backward would scale them again."""
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.arange(4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
