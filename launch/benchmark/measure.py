"""Interleaved steps, and for each method one step under observation."""

from __future__ import annotations

import functools
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from launch.benchmark.contenders import CONTENDERS, Contender, Ours, Setting
from launch.benchmark.watch import Watch
from relora_mora.distributed.collectives import sum_over_hosts


@dataclass
class Result:
    """One contender. Seconds of each measured step, and what this process spent in it: seconds of processor time on all threads,
    page faults; ``loss`` shows that it trains.

    Bytes on one rank, the first where they differ. ``bytes_held`` by part between steps: weights, optimizer, gradients, and
    ``host`` for what is not on the device. The others are those of :class:`launch.benchmark.watch.Watch`.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    page_faults: list[int] = field(default_factory=list)
    trainable: int = 0
    bytes_held: dict[str, int] = field(default_factory=dict)
    bytes_at_peak: dict[str, int] = field(default_factory=dict)
    bytes_kept: int = 0
    bytes_kept_by_layer: int = 0
    bytes_kept_by_linears: int = 0
    bytes_sent: dict[str, int] = field(default_factory=dict)
    flops_per_step: float = 0.0
    merge_seconds: float | None = None
    loss: float = float("nan")

    @property
    def held(self) -> int:
        """On the device."""
        return sum(size for part, size in self.bytes_held.items() if part != "host")

    @property
    def peak(self) -> int:
        return sum(self.bytes_at_peak.values())

    @property
    def sent(self) -> int:
        return sum(self.bytes_sent.values())

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def run(
    names: list[str],
    setting: Setting,
    *,
    repeats: int,
    warmup: int,
    merges: bool = True,
    show: Callable[[str], None] | None = None,
) -> list[Result]:
    """Builds every contender, then makes ``repeats`` rounds of one step each, in turns; a collective.

    Times are of the slowest rank. Bytes are those of a step between warmup and rounds. ``show`` gets a profile of one more
    step of each, from torch's profiler.
    """
    built: dict[str, Contender] = {}
    results = {name: Result(name) for name in names}
    for name in names:
        before = live_tensors()  # kept, so that nothing new gets an address of theirs
        built[name] = CONTENDERS[name](setting)
        result = results[name]
        for _ in range(warmup):
            result.loss = built[name].step()
        _observe(result, built[name], before, setting)
    for _ in range(repeats):
        for name in names:
            result, before_step = results[name], resource.getrusage(resource.RUSAGE_SELF)
            result.seconds.append(_timed(built[name].step, setting.device))
            after_step = resource.getrusage(resource.RUSAGE_SELF)
            result.processor_seconds.append(_processor_seconds(after_step) - _processor_seconds(before_step))
            result.page_faults.append(after_step.ru_minflt - before_step.ru_minflt)
    if show is not None:
        for name in names:
            show(f"{name}\n{_profile(built[name], setting.device)}")
    for name in names:
        contender = built[name]
        if merges and isinstance(contender, Ours) and contender.config.method.merges:
            cycle = contender.config.method.operators
            operator = None if not contender.config.method.uses_squares else cycle[1]
            results[name].merge_seconds = _timed(
                functools.partial(contender.merger.merge, 1, 1, operator), setting.device
            )
    return list(results.values())


def _processor_seconds(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def _timed(act: Any, device: torch.device) -> float:
    """Seconds until the slowest rank is done."""
    sum_over_hosts([0.0])  # all begin together
    begin = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize()
    sum_over_hosts([0.0])
    return time.perf_counter() - begin


def _profile(contender: Contender, device: torch.device) -> str:
    """The operations that take most of a step by themselves, with their shares"""
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        contender.step()
    table: str = profiler.key_averages().table(
        sort_by=f"self_{device.type}_time_total", row_limit=20, max_name_column_width=60
    )
    return table


def live_tensors() -> list[Tensor]:
    """Every tensor that exists; a gradient that nobody has looked at has no Python object yet."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and _has_memory(thing)]
    return found + [t.grad for t in found if t.is_leaf and t.grad is not None]


def _has_memory(tensor: Tensor) -> bool:
    """False for what torch.compile traced with, which may stay behind."""
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _observe(result: Result, contender: Contender, before: list[Tensor], setting: Setting) -> None:
    """Makes a step and notes its bytes."""
    held = _held(contender, before, setting.device)
    result.bytes_held = {part: sum(storages(tensors).values()) for part, tensors in held.items()}
    watch = Watch(contender.model, held, setting.device, torch.distributed.get_world_size())
    held.clear()  # or nothing of it could go in the step
    with (
        torch.compiler.set_stance("force_eager"),
        watch,
    ):  # compiled layers hide their tensors: bytes are those of the plain ones
        contender.step()
    result.trainable, result.flops_per_step = contender.trainable, _flops(contender, setting)
    result.bytes_at_peak, result.bytes_sent = watch.peak, watch.sent
    result.bytes_kept, result.bytes_kept_by_layer, result.bytes_kept_by_linears = (
        watch.kept,
        watch.layer_kept,
        watch.linears_kept,
    )


def _held(contender: Contender, before: list[Tensor], device: torch.device) -> dict[str, list[Tensor]]:
    """What the contender keeps between steps, by part; ``gradients`` is everything on the device beside weights and optimizer."""
    parts = contender.parts()
    known = storages(before) | storages(tensor for tensors in parts.values() for tensor in tensors)
    others = (tensor for tensor in live_tensors() if tensor.untyped_storage().data_ptr() not in known)
    parts["gradients"] = [tensor for tensor in others if tensor.device.type == device.type]
    return parts


def _flops(contender: Contender, setting: Setting) -> float:
    """Arithmetic of one step on one rank; unknown (0) for peers."""
    return contender.flops * setting.tokens * setting.accumulation if isinstance(contender, Ours) else 0.0
