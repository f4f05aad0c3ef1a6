"""The planner's bytes against the tensors that live on a CUDA device while a model trains, on fake tensors.

Run by ``make test-fakecuda``.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from relora_mora.sizing.measure import LiveBytes, measure
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import meta_model
from tests.fakecuda.layers import LENGTH, SEQUENCES, model_with
from tests.sizing.tools import make_config


@pytest.mark.parametrize(
    "documents,dtype,kv_heads",
    [(False, torch.bfloat16, 16), (True, torch.bfloat16, 16), (False, torch.bfloat16, 4), (False, torch.float32, 16)],
)
def test_a_gpu_keeps_what_the_planner_says(documents: bool, dtype: torch.dtype, kv_heads: int) -> None:
    torch.autograd.set_multithreading_enabled(False)  # backward in this thread, inside the modes
    config = make_config({"name": "full"}, micro_batch_size=SEQUENCES)
    data = config.data.model_copy(update={"document_mask": documents, "sequence_length": LENGTH})
    config = config.model_copy(update={"data": data})
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = model_with("llama_250m", "full", 2, fake, dtype, num_key_value_heads=kv_heads)
    tracker = LiveBytes()
    for parameter in model.parameters():
        tracker.add(parameter.data)
    weights = tracker.now
    with fake, tracker:
        ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.long, device="cuda")
        boundaries = torch.zeros(2 * SEQUENCES + 1, dtype=torch.int32, device="cuda") if documents else None
        loss = model(ids, ids, boundaries, float(ids.numel()))
        kept = tracker.now - weights
        loss.backward()
    setup = Setup(config, 0, 1, bf16=dtype is torch.bfloat16, on_gpu=True, compiled=False)
    planned = measure(meta_model(model.lm.config, config.method), setup)
    # on CUDA, the head's gradient stays in float32 until backward
    more = (4 - setup.width) * model.lm.lm_head.weight.numel()
    assert kept == pytest.approx(planned.kept + more, rel=0.05)
    assert tracker.most - weights == pytest.approx(planned.most, rel=0.05)
