"""Which device each rank computes on. It is bound before the process group is made: NCCL connects the ranks by it."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from relora_mora.distributed.collectives import same_on_all_ranks
from relora_mora.system.hardware import uses_cuda

_GPU_REMEDY = "start one rank for each GPU, or compute on CPUs with DS_ACCELERATOR=cpu in the environment"


class DeviceAssignment(NamedTuple):
    """Where a rank computes. ``gpu`` is the UUID of its GPU; None on CPUs, and where none of the visible is its own.

    ``address`` is where gloo listens for the other ranks; None where there are none, or GLOO_SOCKET_IFNAME says it.
    """

    host: str
    local_rank: int
    visible: int  # GPUs
    gpu: str | None
    address: str | None = None


def backend_name() -> str:
    """The backend of collectives on the ranks' tensors."""
    return "nccl" if uses_cuda() else "gloo"


def device_of_rank() -> torch.device:
    """The device of this rank's model."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")


def bind_device(store: Any, rank: int, world_size: int) -> torch.device | None:
    """Makes this rank's GPU the current one and returns it, None on CPUs; every rank calls it.

    LOCAL_RANK in the environment becomes the number of the GPU: DeepSpeed computes on the device of that number.
    Raises ValueError, on every rank, where the GPUs or the address of any rank do not fit.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    visible = torch.cuda.device_count() if uses_cuda() else 0
    index = gpu_of(local_rank, visible)
    gpu = None
    if index is not None:
        torch.cuda.set_device(index)
        os.environ["LOCAL_RANK"] = str(index)
        gpu = str(torch.cuda.get_device_properties(index).uuid)
    mine = DeviceAssignment(socket.gethostname(), local_rank, visible, gpu, _gloo_address() if world_size > 1 else None)
    seats = _seats_of_ranks(mine, store, rank, world_size)
    fault = seat_fault(seats)
    if not any(seat.visible for seat in seats) and os.environ.get("DS_ACCELERATOR") == "cuda":
        said = "DS_ACCELERATOR=cuda in the environment: torch sees no GPU here; unset it to compute on CPUs"
        raise same_on_all_ranks(ValueError(said))
    if fault:
        raise same_on_all_ranks(ValueError(fault))
    return None if index is None else torch.device("cuda", index)


def gpu_of(local_rank: int, visible: int) -> int | None:
    """The GPU of a rank among those it sees: the only one, where the launcher shows each rank its own."""
    if visible == 1:
        return 0
    return local_rank if local_rank < visible else None


def seat_fault(seats: Sequence[DeviceAssignment]) -> str | None:
    """What keeps these ranks from computing together, and the remedy; None if nothing does."""
    gpu_fault = _gpu_fault(seats)
    return _address_fault(seats) or (gpu_fault and f"{gpu_fault}; {_GPU_REMEDY}")


def _address_fault(seats: Sequence[DeviceAssignment]) -> str | None:
    if len({seat.host for seat in seats}) == 1:
        return None
    for rank, seat in enumerate(seats):
        if seat.address is not None and ipaddress.ip_address(seat.address).is_loopback:
            return (
                f"rank {rank} on {seat.host} would listen at {seat.address}, which is what that host's name means "
                "there and no other host can reach; set GLOO_SOCKET_IFNAME to the network interface that leads to the "
                "others, or mend the name in /etc/hosts"
            )
    return None


def _gpu_fault(seats: Sequence[DeviceAssignment]) -> str | None:
    owners: dict[str, int] = {}
    for rank, seat in enumerate(seats):
        if not seat.visible:
            others = [other for other, its in enumerate(seats) if its.visible]
            if others:
                return f"rank {rank} on {seat.host} sees no GPU, and rank {others[0]} on {seats[others[0]].host} does"
            continue
        if seat.gpu is None:
            return f"rank {rank} on {seat.host} has LOCAL_RANK={seat.local_rank}, and {seat.visible} GPUs are visible"
        owner = owners.setdefault(seat.gpu, rank)
        if owner != rank:
            return f"ranks {owner} and {rank} on {seat.host} see 1 GPU, and it is the same ({seat.gpu})"
    return None


def _gloo_address() -> str | None:
    """As torch's ProcessGroupGloo finds it: what this host's name means, or else the loopback address."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return None
    with contextlib.suppress(OSError, UnicodeError):  # a name may be longer than DNS allows
        for family, kind, protocol, _, address in socket.getaddrinfo(
            socket.gethostname(), None, type=socket.SOCK_STREAM
        ):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return str(address[0])
    return "127.0.0.1"


def has_met(store: Any, rank: int) -> bool:
    """Whether a rank has taken its seat in a store."""
    return bool(dist.PrefixStore("seats", store).check([str(rank)]))


def _seats_of_ranks(mine: DeviceAssignment, store: Any, rank: int, world_size: int) -> list[DeviceAssignment]:
    if world_size == 1:
        return [mine]
    seats = dist.PrefixStore("seats", store)
    seats.set(str(rank), json.dumps(mine))
    ranks = [str(other) for other in range(world_size)]
    seats.wait(ranks)
    return [DeviceAssignment(*json.loads(text)) for text in seats.multi_get(ranks)]
