"""The pool that other tests use: workers that hang or die are reported soon, with their stacks."""

from __future__ import annotations

import os
import threading

import pytest

from tests.tools.pool import Pool, PoolError

pytestmark = [pytest.mark.more, pytest.mark.distributed]


def _rank_1_hangs() -> None:
    import torch

    if torch.distributed.get_rank() == 1:
        threading.Event().wait()
    torch.distributed.barrier()


def _rank_1_dies() -> None:
    import torch

    torch.distributed.barrier()
    if torch.distributed.get_rank() == 1:
        os._exit(7)
    threading.Event().wait()


def _rank_0_fails() -> None:
    import torch

    if torch.distributed.get_rank() == 0:
        raise ValueError("what went wrong")
    torch.distributed.barrier()


@pytest.mark.parametrize(
    "function,message",
    [
        (_rank_0_fails, r"(?s)no answer to _rank_0_fails.*rank 0 had failed:.*what went wrong.*rank 1:.* in barrier\n"),
        (_rank_1_hangs, r"(?s)no answer to _rank_1_hangs.*rank 0:.* in barrier\n.*rank 1:.* in _rank_1_hangs\n"),
        (_rank_1_dies, r"(?s)rank 1 ended with code 7 in _rank_1_dies.*rank 0:.* in _rank_1_dies\n"),
    ],
)
def test_workers_that_hang_or_die_are_reported_with_their_stacks(function, message):
    pool = Pool(2)
    pool(os.getpid)
    pool.idle_seconds = 3
    with pytest.raises(PoolError, match=message):
        pool(function)
    assert pool.is_broken
    assert not any(process.is_alive() for process in pool.processes)
