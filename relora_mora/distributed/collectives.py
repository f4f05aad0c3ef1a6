"""Collectives through host memory, and what the errors of collectives mean."""

from __future__ import annotations

import contextlib
import datetime
import functools
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from relora_mora.distributed.waiting import collective
from relora_mora.system.files import LOST_DISK
from relora_mora.system.hardware import ran_out_of_memory

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
LEAVE_SECONDS = 30.0  # for the other ranks to end a run that is done
START_SECONDS = 1800.0  # for what ranks do before a watchdog watches over them
WATCHED_SECONDS = 24 * 3600.0  # a backstop: the watchdog knows how long each wait may take


class RanksError(ValueError):
    """What is wrong on some ranks and not on others: their hosts have other files, or less memory."""

    same_on_all_ranks = True


@functools.cache
def control_group() -> Any:
    """All ranks over gloo, beside the group that training uses: for values that are needed in host memory."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=START_SECONDS))


def let_ranks_wait() -> None:
    """From now on a watchdog says how long a rank may keep the others waiting."""
    if dist.get_world_size() > 1:
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.15
        set_timeout(datetime.timedelta(seconds=WATCHED_SECONDS), control_group())


def sum_over_hosts(values: list[float]) -> list[float]:
    """Sums float64 numbers over the ranks without waiting for a device; a collective."""
    return _over_hosts(values, dist.ReduceOp.SUM)


def least_over_hosts(values: list[float]) -> list[float]:
    """The least of the ranks' float64 numbers at each place; a collective like :func:`sum_over_hosts`."""
    return _over_hosts(values, dist.ReduceOp.MIN)


def _over_hosts(values: list[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    if dist.get_world_size() == 1:
        return values
    numbers = torch.tensor(values, dtype=torch.float64)
    with collective():
        dist.all_reduce(numbers, how, group=control_group())
    return numbers.tolist()


def gather_from_ranks(value: Any) -> list[Any]:
    """The value that each rank gave, on every rank; a collective. For small values."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with collective():
        dist.all_gather_object(values, value, group=control_group())
    return values


# where the next call after the failure is one of Triton, of a library, or of the driver
_DEVICE_FAILED = (
    "uncorrectable ECC error",
    "Triton Error [CUDA]",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUDA driver error",
)


def is_peer_failure(error: BaseException) -> bool:
    """Whether an exception of gloo, NCCL or the store says that another rank is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in str(error) for word in ("gloo/transport", "Connection closed by peer", "NCCL"))
    )


def is_device_failure(error: BaseException) -> bool:
    """Whether an exception says that the accelerator of this process has failed; not that its memory ran out."""
    failed = isinstance(error, getattr(torch, "AcceleratorError", ())) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in _DEVICE_FAILED)
    )
    return failed and not ran_out_of_memory(error)


def leave_together() -> None:
    """Waits until all ranks that are still there have come here, so that none finds the first one's store gone."""
    if dist.get_world_size() > 1:
        with contextlib.suppress(RuntimeError), collective():
            dist.monitored_barrier(control_group(), timeout=datetime.timedelta(seconds=LEAVE_SECONDS))


def from_first_rank(make: Callable[[], Any]) -> Any:
    """What ``make`` returns on the first rank, on every rank; a collective.

    Its ValueError or OSError is raised on every rank.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [(True, make())]
        except (ValueError, OSError) as error:
            answer = [(False, error)]
    if dist.get_world_size() > 1:
        with collective():
            dist.broadcast_object_list(answer, src=0, group=control_group())
    succeeded, value = answer[0]
    if not succeeded:
        raise same_on_all_ranks(value)
    return value


def on_all_ranks(make: Callable[[], T]) -> T:
    """What ``make`` returns on this rank, once it has done so on every rank; a collective.

    ``make`` calls no collective. Its ValueError or OSError ends all ranks: with the OSError of a rank whose disk is
    gone and may come back, with its own error where each rank has one, else with :class:`RanksError`, which names those
    that have.
    """
    outcome: T | ValueError | OSError
    try:
        outcome = make()
        said = None
    except (ValueError, OSError) as error:
        outcome = error
        said = str(error)
    lost = outcome if isinstance(outcome, OSError) and outcome.errno in LOST_DISK else None
    found = gather_from_ranks((socket.gethostname(), said, lost))
    if all(text is None for _, text, _ in found):
        return outcome  # type: ignore[return-value]
    for _, _, failure in found:
        if failure is not None:
            raise same_on_all_ranks(failure)
    if isinstance(outcome, Exception) and all(text is not None for _, text, _ in found):
        raise same_on_all_ranks(outcome)
    ranks: dict[str, list[str]] = {}
    for rank, (host, text, _) in enumerate(found):
        if text is not None:
            ranks.setdefault(text, []).append(f"rank {rank} ({host})")
    raise RanksError("\n".join(f"{', '.join(places)}, not all ranks: {text}" for text, places in ranks.items()))


def same_on_all_ranks(error: E) -> E:
    """Marks an error that all ranks raise: the first one says it for all."""
    error.same_on_all_ranks = True  # type: ignore[attr-defined]
    return error
