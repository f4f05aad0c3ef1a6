"""What the machine can do: fast precisions, peak rates, memory and deterministic kernels."""

import contextlib
import itertools
import os
import platform
import resource
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from relora_mora.system.devices import CPU, Device, device_of_name

_PROBES = 6
_PRODUCTS = (128, 256, 512, 1024)  # sizes on a CPU; without instructions for bf16, the last one alone takes seconds
_LONGEST_SECONDS = 0.5  # no product begins after so many


def uses_cuda() -> bool:
    """Whether this process computes on GPUs: it sees one, and the environment does not set DS_ACCELERATOR=cpu."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def fast_bf16() -> bool:
    """Whether bf16 matrix products beat float32 ones: on GPUs from Ampere on, on CPUs with AMX or AVX512-BF16."""
    if uses_cuda():
        return torch.cuda.get_device_capability()[0] >= 8
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor from the host to a device without making the host wait.

    The copy to a GPU starts from pinned memory, which torch does not reuse before the copy is done.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def device_here() -> Device:
    """The device that this machine computes with, and its memory; for an unknown card nothing else is known."""
    if not uses_cuda():
        return CPU
    name = torch.cuda.get_device_name()
    known = device_of_name(name) or Device(name, name, 0, 0, 0, 0, 0, "this machine", "")
    return replace(known, memory_gb=torch.cuda.get_device_properties(0).total_memory / 1e9)


def peak_flops(*, bf16: bool, on_cpu: bool = False) -> tuple[float, str]:
    """FLOP/s of one device and the source: a data sheet, or a matrix product measured on this rank's threads.

    ``on_cpu``: the CPU's peak, even if there is a GPU.
    """
    on_cuda = uses_cuda() and not on_cpu
    if on_cuda and bf16:
        device = device_of_name(torch.cuda.get_device_name())
        if device is not None:
            return device.tflops * 1e12, device.source
    place, dtype = "cuda" if on_cuda else "cpu", torch.bfloat16 if bf16 else torch.float32
    _seconds_of_product(torch.randn(8, 8, device=place, dtype=dtype))  # starts threads and libraries
    rates: dict[float, int] = {}  # sizes by FLOP/s
    spent = 0.0
    for size, _ in itertools.product((8192,) if on_cuda else _PRODUCTS, range(_PROBES)):
        if spent < _LONGEST_SECONDS:
            seconds = _seconds_of_product(torch.randn(size, size, device=place, dtype=dtype))
            rates[2 * size**3 / seconds] = size
            spent += seconds
    rate = max(rates)
    return rate, f"measured on a {rates[rate]} x {rates[rate]} product"


def _seconds_of_product(a: torch.Tensor) -> float:
    begin = time.perf_counter()
    a @ a
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def device_name() -> str:
    """The name of the GPU in use, or else the architecture of the CPU."""
    return torch.cuda.get_device_name() if uses_cuda() else platform.machine()


def gpu_memory_bytes() -> int:
    """The total memory of the GPU that this process computes with."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def host_memory_bytes(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """The machine's memory, or the limit of this process's control group (a container, a Slurm job) if it is lower.

    ``groups`` and ``mount`` are the paths that Linux uses for version 2 (cgroups(7)). A limit applies to a group and
    all below it.
    """
    bounds = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError):
        for line in groups.read_text(encoding="utf-8").splitlines():
            group = mount / line.removeprefix("0::/")
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):  # ValueError: "max" means no limit
                    bounds.append(int((folder / "memory.max").read_text(encoding="ascii")))
    return min(bounds)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the memory of the device or of its host, pinned memory included, is full."""
    signs = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in str(error) for s in signs))


def peak_memory_bytes() -> int:
    """This process's peak memory: allocated on the device with CUDA, else resident."""
    if uses_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compute_deterministically() -> None:
    """Makes this process compute the same bits every time on GPUs; CPUs always do, so nothing changes there.

    Call it before CUDA and NCCL start. Through ``torch.use_deterministic_algorithms``, torch then uses its
    deterministic kernels (also for the backward of flash attention), raises RuntimeError for an operation without one,
    and keeps NCCL from summing inside switches (NVLS).
    """
    if not uses_cuda():
        return
    from torch._inductor import config as inductor  # which imports the compiler: seconds

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts; torch refuses products without
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # transformers passes it to the package flash-attn
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(True)
    if hasattr(inductor, "deterministic"):  # from torch 2.10 on: the compiler then selects nothing by timing it
        inductor.deterministic = True
    # nothing reads such memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
