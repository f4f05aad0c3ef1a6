"""The loss in chunks against plain cross-entropy, and the compiled loss against float64."""

import pytest
import torch
import torch.nn.functional as F

from relora_mora.kernels import cpu, ops
from relora_mora.kernels.ops import cross_entropy_
from relora_mora.model.loss import chunked_cross_entropy, loss_chunk
from tests.tools.each import each
from tests.tools.kernels import WITH_LIBRARY, compiled_only

SCALE = torch.tensor(0.25)


def _reference(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = logits.double().requires_grad_()
    loss = F.cross_entropy(wide, labels, ignore_index=-100, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss * 0.25, wide)[0]


def _case(rows: int, vocabulary: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * vocabulary)
    logits = (spread * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::5] = -100
    return logits, labels


@each("library", WITH_LIBRARY)
@each("dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
@each("vocabulary", [1, 5, 16, 31, 500, 32100])
@each("spread", [0.1, 3.0, 60.0])
def test_loss_and_gradient_agree_with_float64(vocabulary, dtype, tolerance, spread, library, device, monkeypatch):
    monkeypatch.setattr(ops, "enabled", library)
    logits, labels = (tensor.to(device) for tensor in _case(13, vocabulary, dtype, spread))
    by_kernel = ops.supports(logits)
    expected, gradient = _reference(logits, labels)
    scale = SCALE.to(device)
    loss, _ = cross_entropy_(logits.clone(), labels, ignore=-100, scale=scale, gradient=False)
    again, actual = cross_entropy_(logits, labels, ignore=-100, scale=scale, gradient=True)
    assert torch.equal(loss, again)
    assert actual.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-5)
    # the torch fallback takes exp of a difference from log sum exp, whose rounding error is 1e-5 at 200
    torch.testing.assert_close(actual.double(), gradient, rtol=tolerance if by_kernel else tolerance + 2e-5, atol=1e-7)


@compiled_only
@each("dtype", [torch.bfloat16, torch.float32])
def test_threads_change_no_bit_and_instruction_sets_change_only_rounding(dtype):
    before, results = torch.get_num_threads(), []
    try:
        for threads, instructions in ((1, 2), (2, 2), (5, 2), (1, 1), (1, 0)):
            torch.set_num_threads(threads)
            cpu.load().remora_use(instructions)
            logits, labels = _case(301, 777, dtype)
            results.append(cross_entropy_(logits, labels, ignore=-100, scale=SCALE, gradient=True))
    finally:
        torch.set_num_threads(before)
        cpu.load().remora_use(cpu.BEST)
    for index, (loss, gradient) in enumerate(results):
        if index < 3:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(gradient, results[0][1])
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-6 if dtype is torch.float32 else 2**-7, atol=1e-9)


@compiled_only
@each("bad", [float("nan"), float("inf"), float("-inf")])
@each("dtype", [torch.bfloat16, torch.float32])
@each("place", [0, 17, 8200])
def test_a_nonfinite_logit_makes_the_result_nonfinite(bad, dtype, place):
    logits = torch.zeros(1, 8201, dtype=dtype)
    logits[0, place] = bad
    if bad == float("-inf"):  # a token that is ruled out, which is fine unless it is the label
        loss, gradient = cross_entropy_(logits.clone(), torch.tensor([3]), ignore=-100, scale=SCALE, gradient=True)
        assert loss.item() == pytest.approx(torch.tensor(8200.0).log().item(), rel=1e-6)
        assert gradient[0, place] == 0
        assert cross_entropy_(logits, torch.tensor([place]), ignore=-100, scale=SCALE, gradient=True)[0] == float("inf")
        return
    loss, gradient = cross_entropy_(logits, torch.tensor([3]), ignore=-100, scale=SCALE, gradient=True)
    assert not loss.isfinite()
    assert not gradient.isfinite().any()


@compiled_only
@each("label", [21, -1, 2**40])
def test_a_label_outside_the_vocabulary_is_refused(label):
    with pytest.raises(IndexError, match="the vocabulary has 21"):
        cross_entropy_(torch.zeros(2, 21), torch.tensor([3, label]), ignore=-100, scale=SCALE, gradient=True)


@each("chunk", [1, 3, 7, 100])
@each("dtype,tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunked_loss_and_gradients_equal_plain_cross_entropy(chunk, dtype, tolerance, device):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 10, 6, dtype=dtype).to(device), torch.randn(11, 6, dtype=dtype).to(device)
    labels = torch.randint(0, 11, (2, 10)).to(device)
    labels[0, :4] = -100
    results = []
    for loss_of in (
        lambda h, w: chunked_cross_entropy(h, w, labels, chunk_tokens=chunk),
        lambda h, w: F.cross_entropy((h @ w.T).flatten(0, 1).float(), labels.flatten(), ignore_index=-100),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = loss_of(h, w)
        (loss * 3).backward()
        results.append((loss.double(), h.grad.double(), w.grad.double()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_without_labels_the_loss_is_zero():
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(5, 4), torch.full((1, 3), -100))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_evaluation_computes_no_gradients():
    """Parameters require gradients under no_grad too, but the head must not compute them then."""
    weight = torch.randn(11, 6, requires_grad=True)
    hidden, labels = torch.randn(4, 6), torch.randint(0, 11, (4,))
    kept: list[torch.Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = chunked_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    assert kept == []
    assert loss.item() == pytest.approx(chunked_cross_entropy(hidden, weight, labels).item(), rel=1e-6)
    assert loss.item() == chunked_cross_entropy(hidden, weight, labels.int()).item()


def test_the_share_of_a_micro_batch_is_not_rounded_to_bf16():
    """A third in bf16 is 0.2 % too large, and so would be all gradients, their norm and their clipped values."""
    hidden, head = torch.randn(64, 32).bfloat16().requires_grad_(), torch.randn(50, 32).bfloat16().requires_grad_()
    labels = torch.arange(64) % 50
    gradients = []
    for share in (1.0, 1 / 3):
        loss = chunked_cross_entropy(hidden, head, labels) * share
        gradients.append(torch.autograd.grad(loss, (hidden, head)))
    for whole, third in zip(*gradients, strict=True):
        ratio = (third.double() * whole.double()).sum() / whole.double().square().sum()
        assert abs(3 * float(ratio) - 1) < 2e-4


def test_chunks_are_equal_parts_below_the_limit():
    assert loss_chunk(100, 50, 4) == 128
    assert loss_chunk(4096, 32100, 2) == 2048
    assert loss_chunk(4096, 32100, 6) == 1024
    assert loss_chunk(8192, 32000, 2, on_gpu=True) == 2731
    assert loss_chunk(8192, 128_256, 2, on_gpu=True) == 2048


def test_in_place_is_for_plain_cpu_tensors_only():
    assert ops.supports(torch.zeros(2, 2)) == cpu.available()
    assert not ops.supports(torch.zeros(2, 2).double())
    assert not ops.supports(torch.empty(2, 2, device="meta"))
