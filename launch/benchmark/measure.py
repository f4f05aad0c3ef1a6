"""Measures steps of several methods in turns, and counts the bytes of one step of each."""

import functools
import gc
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from launch.benchmark.contenders import PEERS, Contender, Ours, Setting
from launch.benchmark.turns import take_turns
from relora_mora.distributed.collectives import sum_over_hosts
from relora_mora.sizing.measure import LiveBytes

_RELEASE_SECONDS = 0.1  # gloo's threads keep a collective's tensors for a moment after its end


def run(
    names: list[str], setting: Setting, *, repeats: int, warmup: int, peak: float, note: Callable[[str], object]
) -> dict[str, dict[str, Any]]:
    """Builds every contender, runs ``repeats`` rounds in which each takes one step, then merges; a collective.

    Bytes are counted in a step between the ``warmup`` steps and the rounds. ``note`` gets a line when a contender is
    ready, and after each round. Returns for each contender medians over its steps, and what else describes it: bytes
    are those of one rank; if ranks differ, of the first. ``peak``: FLOP/s of a rank, for ``utilization``.
    """
    built: dict[str, Contender] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        before = live_tensors()  # kept alive, so that no new tensor gets one of their addresses
        contender = built[name] = PEERS[name](setting) if name in PEERS else Ours(setting, *name.split("_"))
        for _ in range(warmup):
            contender.step()
        found[name] = _bytes_of_step(contender, before, setting.device)
        note(f"{name}: ready after {warmup + 1} steps")
    measures = {name: functools.partial(_seconds, contender.step, setting.device) for name, contender in built.items()}
    rounds = list(take_turns(measures, rounds=repeats, note=note))
    tokens = setting.tokens * setting.accumulation
    for name, contender in built.items():
        steps = pd.Series([costs[name] for costs in rounds])
        low, seconds, high = steps.quantile([0.25, 0.5, 0.75])
        merge_seconds = _merge_seconds(contender, setting.device)
        found[name] |= {
            "step_seconds": seconds,
            "spread": (high - low) / 2 / seconds,
            "tokens_per_second": tokens * torch.distributed.get_world_size() / seconds,
            # the arithmetic of other packages is unknown
            "utilization": contender.flops * tokens / seconds / peak if isinstance(contender, Ours) else None,
            "merge_steps": None if merge_seconds is None else merge_seconds / seconds,
            "trainable_parameters": contender.trainable,
        }
    return found


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


def _bytes_of_step(contender: Contender, before: list[Tensor], device: torch.device) -> dict[str, float]:
    """Makes one slow step: its bytes, and its loss, which shows that the contender trains.

    ``before`` are the tensors that do not belong to the contender.
    """
    known = storages([*before, *contender.on_host])
    held = [
        each
        for each in live_tensors()
        if each.device.type == device.type and each.untyped_storage().data_ptr() not in known
    ]
    tracker = ByteTracker(held, device, torch.distributed.get_world_size())
    held.clear()  # tensors that the step replaces could not be freed while this list refers to them
    # compiled layers hide their tensors, so the bytes are those of the same layers in eager mode
    with torch.compiler.set_stance("force_eager"), tracker:
        loss = contender.step()
    return {
        "bytes_held": tracker.held,
        "bytes_at_peak": tracker.most,
        "bytes_sent": sum(tracker.sent.values()),
        "loss": loss,
    }


class ByteTracker(LiveBytes):
    """Counts the bytes of one step that a contender makes inside ``with tracker:``. The step is slow; do not time it.

    ``most``: bytes on the device at the peak of the step. All contenders live in one process, so its resident memory
    says nothing about a single one. The tracker therefore starts from the tensors that the contender held before the
    step. Scratch memory inside an operation is not visible on a CPU. On CUDA the allocator gives the peak
    (``torch.cuda.max_memory_allocated``).

    ``sent``: bytes that this rank passes to collectives, by kind; empty with one rank. The payload of a collective is
    the whole tensor it works on: the input of an all-reduce, reduce or reduce-scatter, or the output of an all-gather.
    In a ring of W ranks each rank then sends (W - 1) / W of the payload, and twice as much for an all-reduce.
    """

    def __init__(self, held: Iterable[Tensor], device: torch.device, world_size: int) -> None:
        super().__init__()
        self.device = device
        self.world_size = world_size
        self.sent: dict[str, int] = {}
        for tensor in held:
            self.add(tensor)
        self.held = self.now

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._begin = torch.cuda.memory_allocated()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.device.type == "cuda":
            self.most = self.held + torch.cuda.max_memory_allocated() - self._begin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func.overloadpacket.__name__.strip("_")
        if func.namespace == "c10d" and self.world_size > 1 and "barrier" not in kind:
            payloads = (sum(value.nbytes for value in tree_leaves(arg) if isinstance(value, Tensor)) for arg in args)
            self.sent[kind] = self.sent.get(kind, 0) + max(payloads, default=0)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def add(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device.type and super().add(tensor)


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
