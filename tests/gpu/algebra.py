"""Operators, layers, kernels, loss and exports on a GPU: the tests of these, with another ``device``.

Run by ``make test-gpu``.
"""

import pytest
import torch

from relora_mora.kernels import cpu, ops
from relora_mora.model import causal
from relora_mora.model import documents as attention
from relora_mora.model.causal import LossModel, build_model
from tests.adapters.test_layers import test_all_forms_agree
from tests.adapters.test_stored import test_values_and_gradients_are_those_of_the_rounded_factors
from tests.kernels.test_kernels import (
    test_compiled_sum_rounds_once,
    test_expand_add_rounds_once,
    test_sums_of_any_number_and_layout_of_rows,
)
from tests.model.test_any_model import test_gradients_are_those_of_transformers
from tests.model.test_attention import DOCUMENTS, loss_and_gradients
from tests.model.test_loss import (
    test_chunked_loss_and_gradients_equal_plain_cross_entropy,
    test_loss_and_gradient_agree_with_float64,
)
from tests.test_operators import test_an_operator_in_the_types_of_training_agrees_with_float64
from tests.tools.kernels import gpu_only
from tests.tools.tiny import tiny_llama
from tests.weights.conftest import hf_tokenizer, model, run
from tests.weights.test_export import (
    checkpoint,
    test_an_export_has_the_logits_of_the_merged_model,
    test_every_form_of_a_model_has_the_same_loss,
    text,
)


@gpu_only
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_flash_attention_separates_documents_like_a_mask(
    documents: list[list[int]], kv_heads: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "head_dim": 16}
    model = LossModel(build_model(tiny_llama(**sizes), seed=1), passes_boundaries=True).to(device, torch.bfloat16)
    calls = []
    real = attention.flash
    monkeypatch.setattr(attention, "flash", lambda *given, **named: calls.append(1) or real(*given, **named))
    flash = loss_and_gradients(model, documents, device)
    assert len(calls) == model.lm.config.num_hidden_layers
    monkeypatch.setattr(causal, "needs_no_mask", lambda *_: False)
    for a, b in zip(flash, loss_and_gradients(model, documents, device), strict=True):
        assert (a - b).norm() <= 0.03 * b.norm() + 1e-6  # a single token gives queries and keys no gradient


@gpu_only
def test_kernels_compute_here(device: torch.device) -> None:
    assert ops.describe("cuda") == "Triton"
    assert ops.supports(torch.zeros(2, 2, dtype=torch.bfloat16, device=device))
