"""Collectives through host memory, and what the errors of collectives mean."""

import contextlib
import datetime
import functools
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from relora_mora.system.files import LOST_DISK
from relora_mora.system.hardware import ran_out_of_memory

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
LEAVE_SECONDS = 30.0  # for the other ranks to reach the end of a run that is done
WAIT_SECONDS = 24 * 3600.0  # a backstop: the watchdog knows how long each wait may take


class RanksError(ValueError):
    """A problem on some ranks only: their hosts have other files, or less memory."""

    same_on_all_ranks = True


@functools.cache
def control_group() -> Any:
    """A gloo group of all ranks, next to the group that training uses: for values that are needed in host memory."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=WAIT_SECONDS))


def sum_over_hosts(values: list[float]) -> list[float]:
    """Sums float64 numbers over the ranks without waiting for a device; a collective."""
    if dist.get_world_size() == 1:
        return values
    numbers = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(numbers, group=control_group())
    return numbers.tolist()


def gather_from_ranks(value: Any) -> list[Any]:
    """The values of all ranks, in order, on every rank; a collective. For small values."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


# messages of Triton, a library or the driver, if the failure shows in the next call of one of these
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
    """Whether an exception says that this process's accelerator has failed. Running out of memory does not count."""
    failed = isinstance(error, getattr(torch, "AcceleratorError", ())) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_FAILED)
    )
    return failed and not ran_out_of_memory(error)


def leave_together() -> None:
    """Waits until all ranks that are still alive are here, so that the first one's store outlives their last use."""
    if dist.get_world_size() > 1:
        with contextlib.suppress(RuntimeError):
            dist.monitored_barrier(control_group(), timeout=datetime.timedelta(seconds=LEAVE_SECONDS))


def from_first_rank(make: Callable[[], Any]) -> Any:
    """Calls ``make`` on the first rank and returns its result on every rank; a collective.

    Its ValueError or OSError is raised on every rank.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [(True, make())]
        except (ValueError, OSError) as error:
            answer = [(False, error)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(answer, src=0, group=control_group())
    succeeded, value = answer[0]
    if not succeeded:
        raise same_on_all_ranks(value)
    return value


def on_all_ranks(make: Callable[[], T]) -> T:
    """Calls ``make`` on every rank and returns this rank's result once all have succeeded; a collective.

    ``make`` must not call a collective. If it raises ValueError or OSError on a rank, all ranks raise an error: the
    OSError of a rank whose disk is gone and may come back, else their own error if every rank has one, else
    :class:`RanksError`, which names the ranks that failed.
    """
    outcome: T | ValueError | OSError
    try:
        outcome = make()
        message = None
    except (ValueError, OSError) as error:
        outcome = error
        message = str(error)
    lost = outcome if isinstance(outcome, OSError) and outcome.errno in LOST_DISK else None
    of_ranks = gather_from_ranks((socket.gethostname(), message, lost))
    if all(text is None for _, text, _ in of_ranks):
        return outcome  # type: ignore[return-value]
    for _, _, failure in of_ranks:
        if failure is not None:
            raise same_on_all_ranks(failure)
    if isinstance(outcome, Exception) and all(text is not None for _, text, _ in of_ranks):
        raise same_on_all_ranks(outcome)
    ranks: dict[str, list[str]] = {}
    for rank, (host, text, _) in enumerate(of_ranks):
        if text is not None:
            ranks.setdefault(text, []).append(f"rank {rank} ({host})")
    raise RanksError("\n".join(f"{', '.join(places)}, not all ranks: {text}" for text, places in ranks.items()))


def same_on_all_ranks(error: E) -> E:
    """Marks an error that all ranks raise, so that only the first rank reports it."""
    error.same_on_all_ranks = True  # type: ignore[attr-defined]
    return error
