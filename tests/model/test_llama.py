"""A LLaMA's hidden states, documents and initial values, and the loss in chunks compared with plain cross-entropy."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from relora_mora.adapters.inject import inject
from relora_mora.config.schema import MethodConfig
from relora_mora.data.stream.packing import document_boundaries
from relora_mora.kernels import ops
from relora_mora.model.causal import LossModel, build_model, empty_model, initial_values, put_values
from relora_mora.model.loss import chunked_cross_entropy
from tests.tools.each import each
from tests.tools.tiny import batch, tiny_llama


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


@each("tied", [False, True])
def test_the_wrapped_model_has_transformers_loss_and_gradients(tied, device):
    plain, wrapped = (build_model(tiny_llama(tie_word_embeddings=tied), seed=5).to(device) for _ in range(2))
    ids, labels = (tensor.to(device) for tensor in batch(0))
    expected = F.cross_entropy(plain(ids).logits.flatten(0, 1), labels.flatten())
    expected.backward()
    loss = LossModel(wrapped)(ids, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, a), (other, b) in zip(wrapped.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


class NoValueIsRead(TorchDispatchMode):
    """Fails if a value is read back, since that makes the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "equal"}, func
        return func(*args, **(kwargs or {}))


@each("attention", ["sdpa", "eager"])
def test_hidden_states_equal_transformers_and_no_value_is_read_back(attention):
    lm = build_model(tiny_llama(), seed=5, attention=attention)
    ids, labels = batch(0)
    expected = lm.model(ids, use_cache=False).last_hidden_state
    model = LossModel(lm)
    assert torch.equal(model.hidden(ids, None), expected)
    with mock.patch.object(ops, "enabled", False), NoValueIsRead():  # CPU kernels read the labels, GPU kernels do not
        model(ids, labels, document_boundaries(torch.zeros_like(ids)), 64.0)
        model(ids, labels, None, 64.0)


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


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "factor": 4.0,
    "short_factor": [1.0] * 6,
    "long_factor": [4.0] * 6,
    "original_max_position_embeddings": 10,
}


@each("attention", ["sdpa", "eager"])
def test_a_document_in_a_sequence_has_the_same_loss_as_by_itself(attention):
    """This holds even if the rotary frequencies depend on how many positions are in use."""
    model = LossModel(build_model(tiny_llama(rope_parameters=LONGROPE), seed=1, attention=attention))
    ids, labels = (tensor[:1] for tensor in batch(0))
    documents = document_boundaries(torch.tensor([[1] * 3 + [2] * 9 + [3] * 4], dtype=torch.int32))
    for document in (slice(0, 3), slice(3, 12), slice(12, 16)):
        inside = torch.full_like(labels, -100)
        inside[:, document] = labels[:, document]
        together = model(ids, inside, documents).item()
        assert together == pytest.approx(model(ids[:, document], labels[:, document]).item(), abs=1e-6)
        assert abs(model(ids, inside).item() - together) > 1e-5


# ---- initial values --------------------------------------------------------------------------------------------------


def test_a_weight_depends_on_nothing_but_seed_name_and_shape():
    generator = torch.random.get_rng_state()
    small, large = (
        dict(build_model(tiny_llama(num_hidden_layers=layers), seed=7).named_parameters()) for layers in (1, 3)
    )
    assert all(torch.equal(value, large[name]) for name, value in small.items())
    drawn = [value for value in large.values() if value.ndim == 2]
    firsts = {value.flatten()[0].item() for value in drawn}
    assert len(firsts) == len(drawn)  # no two weights start with the same number
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert not torch.equal(large["lm_head.weight"], build_model(tiny_llama(), seed=8).lm_head.weight)


@each("tied", [False, True])
def test_values_are_filled_in_next_to_adapters(tied):
    model_config = tiny_llama(tie_word_embeddings=tied)
    lm = empty_model(model_config)
    inject(lm, MethodConfig(name="remora", rank=3), seed=0)
    empty = [name for name, p in lm.named_parameters() if p.is_meta]
    put_values(lm, initial_values(empty_model(lm.config), empty, 5))
    assert not any(tensor.is_meta for tensor in [*lm.parameters(), *lm.buffers()])
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied
    plain = dict(build_model(model_config, seed=5).named_parameters())
    assert set(empty) == set(plain)
    for name, value in plain.items():
        assert torch.equal(lm.get_parameter(name), value)
        # what inject() froze stays frozen
        assert lm.get_parameter(name).requires_grad == (".layers." not in name or "norm" in name)
