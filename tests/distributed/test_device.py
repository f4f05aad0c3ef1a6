"""The device of each rank: which GPU it is, what is refused, and that it is bound before the ranks connect."""

import importlib
import os
from typing import Any

import pytest
import torch
from torch import distributed as dist

from relora_mora.distributed.collectives import is_device_failure
from relora_mora.distributed.join import backend_name, bind_device
from relora_mora.system import hardware


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch see so many GPUs; returns a list of the calls, in order."""
    done: list[Any] = []
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)

    def show(number: int) -> list[Any]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: done[-1])
        monkeypatch.setattr(torch.cuda, "set_device", done.append)
        return done

    return show


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 8, 0), (7, 8, 7), (0, 1, 0), (3, 1, 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, local_rank: int, visible: int, index: int
) -> None:
    done = gpus(visible)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert bind_device() == torch.device("cuda", index)
    assert done == [index]
    assert os.environ["LOCAL_RANK"] == str(index)  # DeepSpeed computes on the device of that number


def test_a_rank_without_a_gpu_is_refused(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2 .*only 2 GPUs .*DS_ACCELERATOR=cpu"):
        bind_device()


def test_the_device_is_bound_before_the_ranks_are_joined(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = gpus(2)
    for name, value in {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    store = dist.HashStore()
    store.set("met/1", "1")  # the other rank is there
    module = importlib.import_module("relora_mora.distributed.join")  # the package shows the function of that name
    monkeypatch.setattr(module, "control_group", lambda: done.append("control group"))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: done.append((backend, given["device_id"])))
    module.join(1.0)
    assert done == [1, ("nccl", torch.device("cuda", 1)), "control group"]


def test_ds_accelerator_cpu_means_cpus_even_if_there_is_a_gpu(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = gpus(1)
    assert hardware.uses_cuda()
    assert backend_name() == "nccl"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not hardware.uses_cuda()
    assert backend_name() == "gloo"
    assert bind_device() is None
    assert done == []
    assert os.environ["LOCAL_RANK"] == "1"
    assert hardware.device_here() is hardware.CPU


def test_asking_for_a_missing_gpu_gives_one_message(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="DS_ACCELERATOR=cuda in the environment, but torch sees no GPU"):
        bind_device()


def test_full_memory_is_not_a_failed_device() -> None:
    full = torch.AcceleratorError("CUDA error: out of memory")  # also raised if the host has no memory left to pin
    failed = torch.AcceleratorError("CUDA error: unspecified launch failure")
    assert hardware.ran_out_of_memory(full)
    assert not is_device_failure(full)
    assert is_device_failure(failed)
    assert not hardware.ran_out_of_memory(failed)
    assert not hardware.ran_out_of_memory(ValueError("out of memory"))
    full_library = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert hardware.ran_out_of_memory(full_library)
    assert not is_device_failure(full_library)


@pytest.mark.parametrize(
    "message",
    [
        "Triton Error [CUDA]: unspecified launch failure",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
        "CUDA driver error: unknown error",
    ],
)
def test_a_failed_device_is_recognized_by_messages_of_libraries(message: str) -> None:
    assert is_device_failure(RuntimeError(message))
    assert not is_device_failure(ValueError(message))
