"""Attention by document boundaries, with one call per document in place of flash attention, compared with a mask."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relora_mora.data.stream.packing import document_boundaries
from relora_mora.model import causal
from relora_mora.model import documents as attention
from relora_mora.model.causal import LossModel, build_model
from tests.tools.each import each
from tests.tools.tiny import batch, tiny_llama

CPU = torch.device("cpu")
DOCUMENTS = {
    "several in each row": [[1] * 6 + [2] * 10, [3] * 16, [0] + [1] * 15, [7, 8] + [9] * 13 + [10]],
    "one in each row": [[0] * 16, [0] * 16, [0] * 16, [0] * 16],
    "each of one token": [list(range(16))] * 4,
    "one that ends with its row, before the same number": [[0] * 9 + [1] * 7, [1] * 3 + [2] * 13, [2] * 16, [2] * 16],
}


def attend_by_document(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, *, longest: int, dropout: float, scale: float
) -> Tensor:
    """The same as ``documents.flash``, document by document."""
    assert boundaries.dtype == torch.int32
    assert boundaries[0] == 0
    assert boundaries[-1] == len(query)
    outputs = []
    for begin, end in pairwise(boundaries.tolist()):
        assert 0 < end - begin <= longest
        q, k, v = (x[begin:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        part = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(part.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def loss_and_gradients(model: LossModel, documents: list[list[int]], device: torch.device = CPU) -> list[Tensor]:
    ids, labels = (tensor[: len(documents)].to(device) for tensor in batch(0))
    boundaries = document_boundaries(torch.tensor(documents, dtype=torch.int32)).to(device)
    model.zero_grad()
    loss = model(ids, labels, boundaries)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@each("checkpointing", [False, True])
@each("kv_heads", [4, 2])
@each("documents", DOCUMENTS.values())
def test_boundaries_separate_documents_like_a_mask(
    documents: list[list[int]], kv_heads: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = build_model(tiny_llama(num_attention_heads=4, num_key_value_heads=kv_heads), seed=1)
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = LossModel(lm, passes_boundaries=True)
    masked = loss_and_gradients(model, documents)
    calls = []
    monkeypatch.setattr(
        attention, "flash", lambda *arguments, **named: calls.append(1) or attend_by_document(*arguments, **named)
    )
    monkeypatch.setattr(causal, "needs_no_mask", lambda *_: True)
    for a, b in zip(loss_and_gradients(model, documents), masked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert len(calls) == lm.config.num_hidden_layers * (2 if checkpointing else 1)


def test_flash_attention_is_for_bf16_and_even_heads_on_gpus() -> None:
    wide = tiny_llama(hidden_size=1024, num_attention_heads=4, num_key_value_heads=4)
    assert attention.flash_supports(256, torch.bfloat16)
    assert not attention.flash_supports(256, torch.float32)
    assert not attention.flash_supports(12, torch.bfloat16)
    assert not attention.flash_supports(264, torch.bfloat16)
    lm = LossModel(build_model(wide, seed=1)).lm
    assert lm.config._attn_implementation == attention.SDPA_OR_DOCUMENTS
    assert not attention.needs_no_mask(lm.bfloat16(), torch.device("cpu"))


def test_the_operator_accepts_our_arguments() -> None:
    """The operator is private to torch, so any version may change it."""
    names = [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    lengths = ["cum_seq_q", "cum_seq_k", "max_q", "max_k"]
    assert names[:10] == ["query", "key", "value", *lengths, "dropout_p", "is_causal", "return_debug_mask"]
    assert "scale" in names[10:]


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
