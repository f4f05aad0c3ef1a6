"""What the machine can do: fast precisions, peak rates, memory in use, and deterministic kernels."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor import config as inductor

from relora_mora.system.devices import CPU, Device, device_of_name

_PROBES = 5


def uses_cuda() -> bool:
    """Whether this process computes on GPUs: it sees one, and DS_ACCELERATOR in the environment does not say cpu."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def fast_bf16() -> bool:
    """Whether bf16 matrix products are faster than float32 ones: CUDA from Ampere on, CPUs with AMX or AVX512-BF16."""
    if uses_cuda():
        return torch.cuda.get_device_capability()[0] >= 8
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on that device, without a wait of the host.

    To a GPU it is copied from pinned memory, which torch does not use again before the copy is done.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def device_here() -> Device:
    """What this machine computes with, and the memory that it has; nothing else is known of an unknown card."""
    if not uses_cuda():
        return CPU
    name = torch.cuda.get_device_name()
    known = device_of_name(name) or Device(name, name, 0, 0, 0, 0, 0, "this machine", "")
    return replace(known, memory_gb=torch.cuda.get_device_properties(0).total_memory / 1e9)


def peak_flops(*, bf16: bool, on_cpu: bool = False) -> tuple[float, str]:
    """FLOP/s of one device and the source: a data sheet, or a matrix product measured on this rank's threads.

    ``on_cpu``: of the CPU, also where there is a GPU.
    """
    on_cuda = uses_cuda() and not on_cpu
    if on_cuda and bf16:
        device = device_of_name(torch.cuda.get_device_name())
        if device is not None:
            return device.tflops * 1e12, device.source
    size = 8192 if on_cuda else 1024  # enough work that starting it does not count
    a = torch.randn(size, size, device="cuda" if on_cuda else "cpu", dtype=torch.bfloat16 if bf16 else torch.float32)
    seconds = []
    for _ in range(1 + _PROBES):
        begin = time.perf_counter()
        a @ a
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds[1:]), f"measured on a {size} x {size} product"


def device_name() -> str:
    """Of the GPU in use; else of the CPU, as Linux names it, elsewhere only its architecture."""
    if uses_cuda():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def gpu_memory_bytes() -> int:
    """All memory of the GPU that this process computes with."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def host_memory_bytes(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of the machine, or what the control groups of this process leave of it: a container's, a Slurm job's.

    ``groups`` and ``mount`` are where Linux keeps them (cgroups(7)); a limit counts for a group and all below it.
    """
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        for line in groups.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, limit = (mount / "memory", "memory.limit_in_bytes") if controllers else (mount, "memory.max")
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):  # ValueError: "max" is no limit
                    bounds.append(int((folder / limit).read_text(encoding="ascii")))
    return min(bounds)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the device or of its host is full, of pinned memory too."""
    said = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in str(error) for s in said))


def peak_memory_bytes() -> int:
    """Most memory this process has had: allocated on the device with CUDA, else resident."""
    if uses_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compute_deterministically() -> None:
    """Has this process repeat bit for bit what it computes on GPUs; on CPUs it always does, and nothing changes.

    To be called before CUDA and NCCL begin. torch then takes the deterministic one of its kernels where it has several,
    the backward of flash attention among them, raises RuntimeError where it has none, and keeps NCCL from adding up
    inside switches (NVLS): ``torch.use_deterministic_algorithms``.
    """
    if not uses_cuda():
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it at its start; without it torch refuses products
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # transformers tells the package flash-attn
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(True)
    if hasattr(inductor, "deterministic"):  # from torch 2.10 on: its compiler then chooses nothing by a stopwatch
        inductor.deterministic = True
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads any
