"""A rank that waits for another one is flagged as waiting for every caller of a collective."""

from __future__ import annotations

import datetime
import threading
import time

import pytest
import torch

from tests.tools.tiny import build_rig, tiny_config

pytestmark = pytest.mark.distributed


def _waiting_for_rank_1(stage: int, moment: str) -> bool:
    """Rank 1 is late for one part of a step: it waits until rank 0 is flagged. Whether rank 1 was not flagged."""

    from relora_mora.distributed.waiting import in_collective

    rank = torch.distributed.get_rank()
    group = torch.distributed.group.WORLD
    assert group is not None
    store = torch.distributed.PrefixStore(f"flag/{stage}/{moment}", group.get_group_store())
    rig = build_rig(tiny_config(2, train={"zero_stage": stage, "micro_batch_size": 4}), bf16=True)
    [(ids, labels)] = rig.micro_batches(1)
    free = []

    def tell() -> None:
        while not in_collective():
            time.sleep(0.001)
        store.set("waits", "yes")

    def come_late(to: str) -> None:
        if to != moment:
            return
        if rank == 0:
            threading.Thread(target=tell, daemon=True).start()
        else:
            store.wait(["waits"], datetime.timedelta(seconds=60))
            free.append(not in_collective())

    come_late("forward")
    loss = rig.engine(ids, labels)
    come_late("backward")
    rig.engine.accumulate(loss, last=True)
    rig.engine.step([0.0 for _ in rig.groups], loss)
    come_late("sum")
    rig.engine.all_reduce(torch.ones(1))
    return rank == 0 or free == [True]


@pytest.mark.parametrize(
    "stage,moment", [(0, "backward"), (1, "backward"), (2, "backward"), (3, "forward"), (3, "backward"), (1, "sum")]
)
def test_a_rank_in_a_collective_is_flagged_and_a_late_one_is_not(pools, stage, moment):
    assert pools(2)(_waiting_for_rank_1, stage, moment) == [True, True]


def test_waits_for_a_gpu_are_flagged(monkeypatch):
    """On GPUs, NCCL's collectives return immediately."""

    from relora_mora.distributed.waiting import in_collective
    from relora_mora.engine import start

    flags = []
    owners = (torch.cuda, torch.cuda.Stream, torch.cuda.Event)
    for owner in owners:
        monkeypatch.setattr(owner, "synchronize", lambda *_: flags.append(in_collective()))
    start._flag_device_waits()
    for owner in owners:
        owner.synchronize()
    assert flags == [True] * 3
    assert not in_collective()


def _on_the_host(late: str) -> bool:

    from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks, sum_over_hosts
    from relora_mora.distributed.waiting import in_collective

    calls = {
        "sum": lambda: sum_over_hosts([1.0]),
        "gather": lambda: gather_from_ranks(None),
        "first": lambda: from_first_rank(lambda: None),
    }
    rank = torch.distributed.get_rank()
    group = torch.distributed.group.WORLD
    assert group is not None
    store = torch.distributed.PrefixStore(f"flag/{late}", group.get_group_store())

    def tell() -> None:
        while not in_collective():
            time.sleep(0.001)
        store.set("waits", "yes")

    if rank == 1:  # the first rank of from_first_rank does not wait for others
        threading.Thread(target=tell, daemon=True).start()
    else:
        store.wait(["waits"], datetime.timedelta(seconds=60))
    calls[late]()
    return not in_collective()


@pytest.mark.parametrize("call", ["sum", "gather", "first"])
def test_collectives_on_the_host_are_flagged(pools, call):
    assert pools(2)(_on_the_host, call) == [True, True]
