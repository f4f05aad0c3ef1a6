"""Interleaved steps, tensors that stay, what is kept for backward, and bytes that collectives move."""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from relora_mora.benchmark.contenders import CONTENDERS, Contender, Ours, Setting
from relora_mora.flops import flops_per_token
from relora_mora.zero import sum_over_hosts

# what DeepSpeed and torch call; a payload is the largest tensor among the arguments
_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "_all_gather_base",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "all_to_all_single",
)


@dataclass
class Result:
    """One contender. Seconds of each measured step; bytes by part; ``loss`` shows that it trains."""

    name: str
    seconds: list[float] = field(default_factory=list)
    bytes_held: dict[str, int] = field(default_factory=dict)
    bytes_kept_for_backward: int = 0
    bytes_communicated: int = 0
    flops_per_step: float = 0.0
    merge_seconds: float | None = None
    loss: float = float("nan")

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


def run(names: list[str], setting: Setting, *, repeats: int, warmup: int, merges: bool = True) -> list[Result]:
    """Builds every contender, then makes ``repeats`` rounds of one step each, in turns; a collective.

    Times are of the slowest rank. What is kept for backward is counted in a step of its own, bytes in the last warmup step.
    """
    built: dict[str, Contender] = {}
    results = {name: Result(name) for name in names}
    for name in names:
        before = live_tensors()  # kept, so that nothing new gets an address of theirs
        built[name] = CONTENDERS[name](setting)
        result = results[name]
        for _ in range(max(0, warmup - 1)):
            built[name].step()
        with counted_bytes() as count:
            result.loss = built[name].step()
        result.bytes_communicated = count.bytes
        result.bytes_held = _held(built[name], before)
        with kept_for_backward(built[name]) as kept:
            built[name].step()
        result.bytes_kept_for_backward = kept.bytes
        result.flops_per_step = _flops(built[name], setting)
    for _ in range(repeats):
        for name in names:
            results[name].seconds.append(_timed(built[name].step, setting.device))
    for name in names:
        contender = built[name]
        if merges and isinstance(contender, Ours) and contender.config.merges:
            cycle = contender.config.method.operators
            operator = None if not contender.config.uses_squares else cycle[1]
            results[name].merge_seconds = _timed(functools.partial(contender.cycle.merge, 1, 1, operator), setting.device)
    return list(results.values())


def _timed(act: Any, device: torch.device) -> float:
    """Seconds until the slowest rank is done."""
    sum_over_hosts([0.0])  # all begin together
    begin = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize()
    sum_over_hosts([0.0])
    return time.perf_counter() - begin


@dataclass
class Counter:
    bytes: int = 0


@contextlib.contextmanager
def counted_bytes() -> Iterator[Counter]:
    """Bytes of the tensors that this rank hands to collectives over devices, each counted once per call."""
    count, before = Counter(), {name: getattr(torch.distributed, name) for name in _COLLECTIVES if hasattr(torch.distributed, name)}

    def counting(name: str) -> Any:
        whole = before[name]

        @functools.wraps(whole)
        def collective(*args: Any, **kwargs: Any) -> Any:
            count.bytes += max((_nbytes(value) for value in [*args, *kwargs.values()]), default=0)
            return whole(*args, **kwargs)

        return collective

    for name in before:
        setattr(torch.distributed, name, counting(name))
    try:
        yield count
    finally:
        for name, whole in before.items():
            setattr(torch.distributed, name, whole)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


@contextlib.contextmanager
def kept_for_backward(contender: Contender) -> Iterator[Counter]:
    """Bytes of what autograd keeps between forward and backward, parameters apart, each storage once; the most of any micro-batch."""
    count = Counter()
    own = {p.untyped_storage().data_ptr() for p in contender.model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            count.bytes = max(count.bytes, sum(seen.values()))
        return tensor

    handle = contender.model.register_forward_pre_hook(lambda *_: seen.clear())
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield count
    finally:
        handle.remove()


def live_tensors() -> list[Tensor]:
    """Every tensor that exists; a gradient that nobody has looked at has no Python object yet."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return found + [t.grad for t in found if t.is_leaf and t.grad is not None]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _held(contender: Contender, before: list[Tensor]) -> dict[str, int]:
    """Bytes that the contender keeps between steps, by part; ``other`` is gradients and buffers."""
    known = storages(before)
    after = {address: size for address, size in storages(live_tensors()).items() if address not in known}
    parts: dict[str, int] = {}
    for name, tensors in contender.parts().items():
        addresses = storages(tensors)
        parts[name] = sum(addresses.values())
        for address in addresses:
            after.pop(address, None)
    parts["other"] = sum(after.values())
    return parts


def _flops(contender: Contender, setting: Setting) -> float:
    """Arithmetic of one step on one rank; unknown (0) for peers."""
    if not isinstance(contender, Ours):
        return 0.0
    return flops_per_token(setting.model_config, contender.config).total * setting.tokens * setting.accumulation
