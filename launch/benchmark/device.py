"""Chooses the device that a benchmark measures, and takes times on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from relora_mora.config.load import ConfigError
from relora_mora.system.hardware import uses_cuda


def device_of_rank() -> torch.device:
    """The device of this rank's model."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")


def chosen_device(name: str | None) -> torch.device:
    """The device of ``--device``, or the one that a run would use; call it before DeepSpeed is imported."""
    if name not in (None, "cpu", "cuda"):
        raise ConfigError([f"--device: got {name}, expected cpu or cuda"], "the command line")
    if name is not None:
        os.environ["DS_ACCELERATOR"] = name
    if name == "cuda" and not uses_cuda():
        fault = f"--device: got cuda, but torch {torch.__version__} sees no GPU here; use --device=cpu"
        raise ConfigError([fault], "the command line")
    return device_of_rank()


def synchronize(device: torch.device) -> None:

    if device.type == "cuda":
        torch.cuda.synchronize(device)


HELD_CYCLES = 40_000_000  # about 20 ms on a GPU


def seconds_of(act: Callable[[], object], device: torch.device) -> float:
    """The seconds that ``act`` takes; on a GPU from the start of its first operation to the end of its last.

    The GPU is held back until the host has queued the operations, so that it does not wait for launches.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        act()
        return time.perf_counter() - begin
    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(HELD_CYCLES)
    begins.record()
    act()
    ends.record()
    torch.cuda.synchronize(device)
    return begins.elapsed_time(ends) / 1000
