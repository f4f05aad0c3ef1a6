"""The device of each rank: which GPU it is, what is refused, and that it is bound before the ranks connect."""

from __future__ import annotations

import importlib
import json
import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed as dist

from relora_mora.distributed.collectives import is_device_failure
from relora_mora.distributed.join import (
    DeviceAssignment,
    assignment_fault,
    backend_name,
    bind_device,
    device_of_rank,
    gpu_of,
)
from relora_mora.system import hardware


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch see GPUs with these UUIDs; returns a list of the calls, in order."""
    done: list[Any] = []
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)

    def show(*uuids: str) -> list[Any]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: done[-1])
        monkeypatch.setattr(torch.cuda, "set_device", done.append)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))
        return done

    return show


def store_with(*assignments: DeviceAssignment) -> dist.Store:
    """A store in which the ranks from 1 on have published their devices."""
    store = dist.HashStore()
    for rank, assignment in enumerate(assignments, 1):
        dist.PrefixStore("devices", store).set(str(rank), json.dumps(assignment))
    return store


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"), [(0, 8, 0), (7, 8, 7), (0, 1, 0), (3, 1, 0), (3, 2, None), (2, 2, None)]
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one(local_rank: int, visible: int, index: int | None) -> None:
    assert gpu_of(local_rank, visible) == index


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ([("a", 0, 0, None), ("a", 1, 0, None)], None),  # CPUs
        ([("a", 0, 2, "G0"), ("a", 1, 2, "G1"), ("b", 0, 2, "G2"), ("b", 1, 2, "G3")], None),
        ([("a", 0, 1, "G0"), ("a", 1, 1, "G1"), ("a", 2, 1, "G2")], None),  # bound by the launcher
        (
            [("a", 0, 1, "G0"), ("a", 1, 1, "G0")],
            "ranks 0 and 1 on a see only one GPU, the same one (G0); start one rank",
        ),
        (
            [("a", 0, 2, "G0"), ("a", 1, 2, "G1"), ("a", 2, 2, None)],
            "rank 2 on a has LOCAL_RANK=2, but only 2 GPUs are visible",
        ),
        ([("a", 0, 1, "G0"), ("b", 0, 0, None)], "rank 1 on b sees no GPU, but rank 0 on a does"),
        (
            [("a", 0, 0, None, "10.0.0.1"), ("b", 0, 0, None, "127.0.1.1")],
            "rank 1 on b would listen at 127.0.1.1, because the name of that host resolves to this address",
        ),
        ([("a", 0, 0, None, "127.0.0.1"), ("a", 1, 0, None, "127.0.0.1")], None),  # one host
        ([("a", 0, 0, None, "10.0.0.1"), ("b", 0, 0, None, None)], None),  # GLOO_SOCKET_IFNAME
    ],
)
def test_ranks_whose_gpus_do_not_fit_all_raise_the_same_message(
    assignments: list[tuple[Any, ...]], expected: str | None, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, *others = [DeviceAssignment(*assignment) for assignment in assignments]
    fault = assignment_fault([mine, *others])
    assert (fault is None) == (expected is None)
    gpus(*(f"G{number}" for number in range(mine.visible)))
    monkeypatch.setattr(socket, "gethostname", lambda: mine.host)
    addresses = [] if mine.address is None else [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (mine.address, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    monkeypatch.setattr(socket.socket, "bind", lambda *_: None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "" if mine.address else "eth0")
    monkeypatch.setenv("LOCAL_RANK", str(mine.local_rank))
    if expected is None:
        bind_device(store_with(*others), 0, len(assignments))
        return
    with pytest.raises(ValueError) as raised:
        bind_device(store_with(*others), 0, len(assignments))
    assert expected in str(raised.value)
    assert str(fault) in str(raised.value)
    assert raised.value.same_on_all_ranks  # type: ignore[attr-defined]


def test_the_only_visible_gpu_is_bound_for_any_local_rank(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = gpus("G3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert bind_device(dist.HashStore(), 0, 1) == torch.device("cuda", 0) == device_of_rank()
    assert done == [0]
    assert os.environ["LOCAL_RANK"] == "0"  # DeepSpeed computes on the device of that number


def test_the_device_is_bound_before_the_ranks_are_joined(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = gpus("G0", "G1")
    for name, value in {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    store = store_with(DeviceAssignment("b", 0, 1, "G2"))
    module = importlib.import_module("relora_mora.distributed.join")  # the package shows the function of that name
    monkeypatch.setattr(module, "control_group", lambda: done.append("control group"))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: done.append((backend, given["device_id"])))
    module.join(1.0)
    assert done == [1, ("nccl", torch.device("cuda", 1)), "control group"]


def test_ds_accelerator_cpu_means_cpus_even_if_there_is_a_gpu(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = gpus("G0")
    assert hardware.uses_cuda()
    assert backend_name() == "nccl"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not hardware.uses_cuda()
    assert backend_name() == "gloo"
    assert device_of_rank().type == "cpu"
    assert bind_device(dist.HashStore(), 0, 1) is None
    assert done == []
    assert os.environ["LOCAL_RANK"] == "1"
    assert hardware.device_here() is hardware.CPU


def test_asking_for_a_missing_gpu_gives_one_message(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="DS_ACCELERATOR=cuda in the environment: torch sees no GPU here"):
        bind_device(dist.HashStore(), 0, 1)


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
