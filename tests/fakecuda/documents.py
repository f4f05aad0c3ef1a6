"""Attention inside documents on CUDA makes no mask.

Run by ``make test-fakecuda``.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.fakecuda.layers import model_with
from tests.fakecuda.watch import Kept, Watch

LENGTH = 4096  # a mask would be the largest tensor


@pytest.fixture(scope="module", autouse=True)
def backward_in_this_thread() -> None:
    torch.autograd.set_multithreading_enabled(False)  # inside the modes


def test_nothing_is_read_back_and_no_mask_is_made() -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = model_with("llama_tiny", "full", 2, fake)
    saved = Kept(model)
    with fake, Watch() as watch, saved:
        ids = torch.zeros(1, LENGTH, device="cuda", dtype=torch.long)
        boundaries = torch.zeros(9, device="cuda", dtype=torch.int32)
        model(ids, ids, boundaries, 4096.0).backward()
    assert watch.syncs == []
    assert watch.launches["_flash_attention_forward"] == watch.launches["_flash_attention_backward"] == 2
    assert max(storage.nbytes() for storage in saved.storages.values()) < LENGTH * LENGTH


def test_one_program_serves_any_number_of_documents() -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = model_with("llama_tiny", "full", 2, fake)
    model.compiled = True
    programs = CompileCounter()
    torch._dynamo.reset()
    for layer in model.lm.model.layers:
        layer.compile(backend=programs, dynamic=False, fullgraph=True)
    with fake:
        ids = torch.zeros(1, LENGTH, device="cuda", dtype=torch.long)
        for documents in (1, 8, 100):
            model(ids, ids, torch.zeros(documents + 1, device="cuda", dtype=torch.int32), 4096.0)
    assert programs.frame_count == 1
