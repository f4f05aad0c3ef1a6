"""Measures steps of several methods in turns, and counts the bytes of one step of each."""

from __future__ import annotations

import functools
import gc
import resource
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.benchmark.contenders import Contender, Ours, Setting, contender_of
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

    Bytes are those of one rank; if ranks differ, of the first: ``held`` on the device between steps, ``peak`` within a
    step, ``sent`` to collectives by kind.
    """

    name: str
    steps: list[StepCost] = field(default_factory=list)
    trainable: int = 0
    held: int = 0
    peak: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    flops_per_step: float = 0.0
    merge_seconds: float | None = None
    loss: float = float("nan")

    def median(self, what: str) -> float:
        return statistics.median(getattr(step, what) for step in self.steps)

    @property
    def spread(self) -> float:
        return relative_spread([step.seconds for step in self.steps])


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
    for name, result in results.items():
        before = live_tensors()  # kept alive, so that no new tensor gets one of their addresses
        contender = built[name] = contender_of(name, setting)
        for _ in range(warmup):
            result.loss = contender.step()
        _count_bytes(result, contender, before, setting.device)
        result.trainable = contender.trainable
        if isinstance(contender, Ours):  # the arithmetic of other packages is unknown
            result.flops_per_step = contender.flops * setting.tokens * setting.accumulation
        note(f"{name}: ready after {warmup + 1} steps")
    measures = {name: functools.partial(_step_cost, contender, setting.device) for name, contender in built.items()}
    for costs in take_turns(measures, rounds=repeats, note=note):
        for name, cost in costs.items():
            results[name].steps.append(cost)
    for name, contender in built.items():
        if show is not None:
            show(f"{name}\n{_profile(contender, setting.device)}")
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
    if device.type == "cuda":
        torch.cuda.synchronize()
    sum_over_hosts([0.0])
    return time.perf_counter() - begin


def _profile(contender: Contender, device: torch.device) -> str:
    """A table of the operations whose own time is the largest part of a step."""
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        contender.step()
    events = profiler.key_averages()
    return str(events.table(sort_by=f"self_{device.type}_time_total", row_limit=20, max_name_column_width=60))


def _count_bytes(result: Result, contender: Contender, before: list[Tensor], device: torch.device) -> None:
    """Makes one slow step and records its bytes; ``before`` are the tensors that do not belong to the contender."""
    known = storages([*before, *contender.on_host()])
    held = [
        each
        for each in live_tensors()
        if each.device.type == device.type and each.untyped_storage().data_ptr() not in known
    ]
    tracker = ByteTracker(held, device, torch.distributed.get_world_size())
    result.held = tracker.size
    held.clear()  # tensors that the step replaces could not be freed while this list refers to them
    # compiled layers hide their tensors, so the bytes are those of the same layers in eager mode
    with torch.compiler.set_stance("force_eager"), tracker:
        contender.step()
    result.peak = tracker.peak
    result.sent = tracker.sent


class ByteTracker(TorchDispatchMode):
    """Counts the bytes of one step that a contender makes inside ``with tracker:``. The step is slow; do not time it.

    ``peak``: bytes on the device at the peak of the step, with each storage counted once. All contenders live in one
    process, so its resident memory says nothing about a single one. The tracker therefore starts from the tensors that
    the contender held before the step and adds those that operations return. Scratch memory inside an operation is not
    visible on a CPU. On CUDA the allocator gives the peak (``torch.cuda.max_memory_allocated``).

    ``sent``: bytes that this rank passes to collectives, by kind; empty with one rank. The payload of a collective is
    the whole tensor it works on: the input of an all-reduce, reduce or reduce-scatter, or the output of an all-gather.
    In a ring of W ranks each rank then sends (W - 1) / W of the payload, and twice as much for an all-reduce.
    """

    def __init__(self, held: Iterable[Tensor], device: torch.device, world_size: int) -> None:
        super().__init__()
        self.device = device
        self.world_size = world_size
        self.size = 0
        self.sent: dict[str, int] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}  # kept, because its callback reports when the storage is freed
        for tensor in held:
            self._put(tensor)
        self.peak = self._held = self.size

    def __enter__(self) -> ByteTracker:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._begin = torch.cuda.memory_allocated()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.device.type == "cuda":
            self.peak = self._held + torch.cuda.max_memory_allocated() - self._begin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func.overloadpacket.__name__.strip("_")
        if func.namespace == "c10d" and self.world_size > 1 and "barrier" not in kind:
            payloads = (sum(value.nbytes for value in tree_leaves(arg) if isinstance(value, Tensor)) for arg in args)
            self.sent[kind] = self.sent.get(kind, 0) + max(payloads, default=0)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._put(value)
        self.peak = max(self.peak, self.size)
        return result

    def _put(self, tensor: Tensor) -> None:
        storage: Any = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or tensor.device.type != self.device.type:
            return

        def freed(_: Any) -> None:
            del self._alive[key]
            self.size -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.size += size


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
