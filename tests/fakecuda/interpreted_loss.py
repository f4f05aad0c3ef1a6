"""The loss of GPUs on CPU tensors, in Triton's interpreter: run by ``make test-fakecuda`` with TRITON_INTERPRET=1.

The interpreter truncates float32 to bfloat16, and a GPU rounds it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relora_mora.kernels import ops, triton_loss
from relora_mora.model import loss as model
from relora_mora.model.loss import chunked_cross_entropy

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


@pytest.mark.parametrize("place", [0, 17, 8200])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_logit_is_noticed(bad: float, place: int) -> None:
    logits = torch.zeros(1, 8201)
    logits[0, place] = bad
    assert not triton_loss.cross_entropy_(logits, torch.tensor([3]), SCALE, -100, True).isfinite().any()
    assert not logits.isfinite().any()


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
    monkeypatch.setattr(ops, "_cross_entropy_", triton_loss.cross_entropy_)
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
