"""Chooses the device that a benchmark measures, and measures several things in turns, so that other work on the machine
affects all of them equally."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

from relora_mora.config.load import ConfigError
from relora_mora.system.hardware import uses_cuda
from relora_mora.system.process import say

T = TypeVar("T")
HELD_CYCLES = 40_000_000  # about 20 ms on a GPU


def chosen_device(name: str | None) -> torch.device:
    """The device of ``--device``, or the one that a run would use; call it before DeepSpeed is imported."""
    if name is not None:
        os.environ["DS_ACCELERATOR"] = name
    if name == "cuda" and not uses_cuda():
        fault = f"--device: got cuda, but torch {torch.__version__} sees no GPU here; use --device=cpu"
        raise ConfigError([fault], "the command line")
    return device_of_rank()


def device_of_rank() -> torch.device:
    """The device of this rank's model."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")


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


def take_turns(
    measures: Mapping[str, Callable[[], T]], *, rounds: int, warmup: int = 0, note: Callable[[str], object] = say
) -> Iterator[dict[str, T]]:
    """Calls every measure once per round, in order, and yields the results by name.

    The first ``warmup`` rounds, which fill caches and compile, are not yielded. ``note`` gets a line for each round.
    """
    for number in range(1, warmup + rounds + 1):
        begin = time.monotonic()
        measured = {name: measure() for name, measure in measures.items()}
        note(f"round {number} of {warmup + rounds}: {time.monotonic() - begin:.1f} s")
        if number > warmup:
            yield measured
