"""train.deterministic: what it switches, where, and when."""

import importlib
import os
from collections.abc import Iterator

import pytest
import torch
from torch._inductor import config as inductor

from relora_mora.system import hardware
from relora_mora.system.hardware import compute_deterministically
from relora_mora.train.pretrain import pretrain
from tests.tools.helpers import arithmetic_put_back
from tests.tools.tiny import tiny_config


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Puts everything back."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
    with arithmetic_put_back():
        yield monkeypatch


def switched() -> set[bool]:
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention's backward would be the faster one
    return {
        torch.are_deterministic_algorithms_enabled(),
        not torch.backends.cuda.cudnn_sdp_enabled(),
        os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8",
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1",
        getattr(inductor, "deterministic", torch.are_deterministic_algorithms_enabled()),  # from torch 2.10 on
    }


def test_nothing_is_switched_on_cpus(switches: pytest.MonkeyPatch) -> None:
    switches.setenv("DS_ACCELERATOR", "cpu")
    compute_deterministically()
    assert switched() == {False}


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_on_gpus_is_switched_before_the_ranks_meet(switches: pytest.MonkeyPatch, deterministic: bool) -> None:
    """Later, NCCL and cuBLAS would ignore it."""
    seen = []

    class StopHere(Exception):
        """The ranks would connect now."""

    def meet(timeout_seconds: float) -> tuple[int, int]:
        seen.append(switched())
        raise StopHere

    switches.setattr(hardware, "uses_cuda", lambda: True)
    switches.setattr(importlib.import_module("relora_mora.train.pretrain"), "init_distributed", meet)
    with pytest.raises(StopHere):
        pretrain(tiny_config(train={"deterministic": deterministic}))
    assert seen == [{deterministic}]
