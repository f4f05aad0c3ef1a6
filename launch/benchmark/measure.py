"""Measures steps of several methods in turns, and counts the bytes of one step of each."""

from __future__ import annotations

import functools
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from launch.benchmark.byte_tracker import ByteTracker
from launch.benchmark.contenders import CONTENDERS, Contender, Ours, Setting
from launch.benchmark.device import synchronize
from launch.benchmark.turns import relative_spread, take_turns
from relora_mora.distributed.collectives import sum_over_hosts

_RELEASE_SECONDS = 0.1  # gloo's threads keep a collective's tensors for a moment after its end


class StepCost(NamedTuple):
    """The cost of one step: seconds until the slowest rank was done, and for this process the processor seconds of all
    its threads and its page faults."""

    seconds: float
    processor_seconds: float
    page_faults: int


@dataclass
class Result:
    """The measurements of one contender. ``loss`` shows that it trains.

    Bytes are those of one rank; if ranks differ, of the first. ``bytes_held`` are bytes between steps by part: weights,
    optimizer, gradients, and ``host`` for bytes that are not on the device. :class:`ByteTracker` describes the others.
    """

    name: str
    steps: list[StepCost] = field(default_factory=list)
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
        """Bytes on the device between steps."""
        return sum(size for part, size in self.bytes_held.items() if part != "host")

    @property
    def peak(self) -> int:
        return sum(self.bytes_at_peak.values())

    @property
    def sent(self) -> int:
        return sum(self.bytes_sent.values())

    @property
    def seconds(self) -> float:

        return statistics.median(step.seconds for step in self.steps)

    @property
    def spread(self) -> float:
        return relative_spread([step.seconds for step in self.steps])

    @property
    def processor_seconds(self) -> float:
        return statistics.median(step.processor_seconds for step in self.steps)

    @property
    def page_faults(self) -> float:
        return statistics.median(step.page_faults for step in self.steps)


def run(
    names: list[str],
    setting: Setting,
    *,
    repeats: int,
    warmup: int,
    note: Callable[[str], object],
    show: Callable[[str], None] | None = None,
) -> list[Result]:
    """Builds every contender, runs ``repeats`` rounds in which each takes one step, then merges; a collective.

    Bytes are counted in a step between the ``warmup`` steps and the rounds. ``note`` gets a line when a contender is
    ready, and after each round. ``show`` receives the report of torch's profiler on one additional step of each
    contender.
    """
    built: dict[str, Contender] = {}
    results = {name: Result(name) for name in names}
    for name in names:
        before = live_tensors()  # kept alive, so that no new tensor gets one of their addresses
        built[name] = CONTENDERS[name](setting)
        for _ in range(warmup):
            results[name].loss = built[name].step()
        _count_bytes(results[name], built[name], before, setting)
        note(f"{name}: ready after {warmup + 1} steps")
    measures = {name: functools.partial(_step_cost, contender, setting.device) for name, contender in built.items()}
    for costs in take_turns(measures, rounds=repeats, note=note):
        for name, cost in costs.items():
            results[name].steps.append(cost)
    if show is not None:
        for name, contender in built.items():
            show(f"{name}\n{_profile(contender, setting.device)}")
    for name, contender in built.items():
        results[name].merge_seconds = _merge_seconds(contender, setting.device)
    return list(results.values())


def _step_cost(contender: Contender, device: torch.device) -> StepCost:
    before = resource.getrusage(resource.RUSAGE_SELF)
    seconds = _seconds(contender.step, device)
    after = resource.getrusage(resource.RUSAGE_SELF)
    processor_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return StepCost(seconds, processor_seconds, after.ru_minflt - before.ru_minflt)


def _merge_seconds(contender: Contender, device: torch.device) -> float | None:
    """Seconds of the second merge, because the first one loads libraries. None if the method does not merge."""
    if not isinstance(contender, Ours) or not contender.config.method.merges:
        return None
    operator = contender.config.method.operators[1] if contender.config.method.uses_squares else None
    merge = functools.partial(contender.merger.merge, 1, 1, operator)
    merge()
    contender.step()
    return _seconds(merge, device)


def _seconds(act: Callable[[], object], device: torch.device) -> float:
    """Seconds until the slowest rank is done."""
    sum_over_hosts([0.0])  # so that all ranks begin together
    begin = time.perf_counter()
    act()
    synchronize(device)
    sum_over_hosts([0.0])
    return time.perf_counter() - begin


def _profile(contender: Contender, device: torch.device) -> str:
    """A table of the operations whose own time is the largest part of a step."""
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        contender.step()
    events = profiler.key_averages()
    return str(events.table(sort_by=f"self_{device.type}_time_total", row_limit=20, max_name_column_width=60))


def _count_bytes(result: Result, contender: Contender, before: list[Tensor], setting: Setting) -> None:
    """Makes one slow step and records its bytes; ``before`` are the tensors that do not belong to the contender."""
    held = _held(contender, before, setting.device)
    result.bytes_held = {part: sum(storages(tensors).values()) for part, tensors in held.items()}
    tracker = ByteTracker(contender.model, held, setting.device, torch.distributed.get_world_size())
    held.clear()  # tensors that the step replaces could not be freed while this dict refers to them
    # compiled layers hide their tensors, so the bytes are those of the same layers in eager mode
    with torch.compiler.set_stance("force_eager"), tracker:
        contender.step()
    result.trainable = contender.trainable
    if isinstance(contender, Ours):  # the arithmetic of other packages is unknown
        result.flops_per_step = contender.flops * setting.tokens * setting.accumulation
    result.bytes_at_peak = tracker.peak
    result.bytes_sent = tracker.sent
    result.bytes_kept = tracker.kept
    result.bytes_kept_by_layer = tracker.layer_kept
    result.bytes_kept_by_linears = tracker.linears_kept


def _held(contender: Contender, before: list[Tensor], device: torch.device) -> dict[str, list[Tensor]]:
    """The contender's tensors between steps, by part; ``gradients``: all on the device but weights and optimizer."""
    parts = contender.parts()
    known = storages(before) | storages(tensor for tensors in parts.values() for tensor in tensors)
    others = (tensor for tensor in live_tensors() if tensor.untyped_storage().data_ptr() not in known)
    parts["gradients"] = [tensor for tensor in others if tensor.device.type == device.type]
    return parts


def live_tensors() -> list[Tensor]:
    """Every tensor of this process, including gradients that only their parameters refer to."""
    time.sleep(_RELEASE_SECONDS)
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and _has_memory(each)]
    return tensors + [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]


def _has_memory(tensor: Tensor) -> bool:
    """False for fake tensors, some of which remain after torch.compile has traced with them."""
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage, by address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
