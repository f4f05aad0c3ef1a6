"""Operators, layers, kernels, loss and exports on a GPU: the tests of these, with another ``device``.

Run by ``make test-gpu``.
"""

import torch

from relora_mora import kernels
from tests.gpu.conftest import gpu_only
from tests.kernels.test_kernels import test_compiled_sum_rounds_once, test_expand_add_rounds_once
from tests.methods.test_layers import test_all_forms_agree
from tests.model.test_llama import (
    test_chunked_loss_and_gradients_are_those_of_plain_cross_entropy,
    test_the_wrapped_model_has_transformers_loss_and_gradients,
)
from tests.model.test_loss import test_loss_and_gradient_are_those_of_float64
from tests.test_export import (
    checkpoint,
    hf_tokenizer,
    model,
    run,
    test_an_export_has_the_logits_of_the_merged_model,
    test_every_form_of_a_model_is_scored_alike,
    text,
)
from tests.test_operators import test_an_operator_in_the_types_of_training_is_that_in_float64


@gpu_only
def test_kernels_compute_here(device: torch.device) -> None:
    assert kernels.describe("cuda") == "Triton"
    assert kernels.takes(torch.zeros(2, 2, dtype=torch.bfloat16, device=device))
