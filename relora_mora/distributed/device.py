"""Which device each rank computes on. A rank binds it before the process group exists, because NCCL needs it."""

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
    """Where a rank computes. ``gpu`` is the UUID of its GPU; None on CPUs, and if no visible GPU has its number.

    ``address`` is where gloo listens for the other ranks; None if there are none, or if GLOO_SOCKET_IFNAME is set.
    """

    host: str
    local_rank: int
    visible: int  # number of GPUs that it sees
    gpu: str | None
    address: str | None = None


def backend_name() -> str:
    """The backend for collectives on tensors of the device."""
    return "nccl" if uses_cuda() else "gloo"


def device_of_rank() -> torch.device:
    """The device of this rank's model."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")


def bind_device(store: Any, rank: int, world_size: int) -> torch.device | None:
    """Makes this rank's GPU the current one and returns it, None on CPUs; every rank calls it.

    Sets LOCAL_RANK in the environment to the index of the GPU, because DeepSpeed computes on the device of that index.
    Raises ValueError on every rank if the GPUs or the address of any rank do not fit.
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
    assignments = [mine]
    if world_size > 1:
        devices = dist.PrefixStore("devices", store)
        devices.set(str(rank), json.dumps(mine))
        ranks = [str(other) for other in range(world_size)]
        devices.wait(ranks)
        assignments = [DeviceAssignment(*json.loads(text)) for text in devices.multi_get(ranks)]
    fault = assignment_fault(assignments)
    if not any(assignment.visible for assignment in assignments) and os.environ.get("DS_ACCELERATOR") == "cuda":
        fault = "DS_ACCELERATOR=cuda in the environment: torch sees no GPU here; unset it to compute on CPUs"
    if fault:
        raise same_on_all_ranks(ValueError(fault))
    return None if index is None else torch.device("cuda", index)


def gpu_of(local_rank: int, visible: int) -> int | None:
    """The index of a rank's GPU. If it sees only one, that is its own: the launcher shows each rank one GPU."""
    if visible == 1:
        return 0
    return local_rank if local_rank < visible else None


def assignment_fault(assignments: Sequence[DeviceAssignment]) -> str | None:
    """Why these ranks cannot compute together, and the remedy; None if they can."""
    one_host = len({assignment.host for assignment in assignments}) == 1
    for rank, one in enumerate(assignments):
        if not one_host and one.address is not None and ipaddress.ip_address(one.address).is_loopback:
            return (
                f"rank {rank} on {one.host} would listen at {one.address}, because the name of that host resolves to "
                "this address there, and no other host can reach it; set GLOO_SOCKET_IFNAME to the network interface "
                "that leads to the other hosts, or fix the name in /etc/hosts"
            )
    gpu_fault = _gpu_fault(assignments)
    return gpu_fault and f"{gpu_fault}; {_GPU_REMEDY}"


def _gpu_fault(assignments: Sequence[DeviceAssignment]) -> str | None:
    owners: dict[str, int] = {}
    with_gpus = [f"rank {rank} on {one.host}" for rank, one in enumerate(assignments) if one.visible]
    for rank, one in enumerate(assignments):
        if not one.visible:
            if with_gpus:
                return f"rank {rank} on {one.host} sees no GPU, but {with_gpus[0]} does"
            continue
        if one.gpu is None:
            return f"rank {rank} on {one.host} has LOCAL_RANK={one.local_rank}, but only {one.visible} GPUs are visible"
        owner = owners.setdefault(one.gpu, rank)
        if owner != rank:
            return f"ranks {owner} and {rank} on {one.host} see only one GPU, the same one ({one.gpu})"
    return None


def _gloo_address() -> str | None:
    """The address that torch's ProcessGroupGloo chooses: it resolves this host's name, or else uses loopback."""
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
    """Whether a rank has published its device in a store."""
    return bool(dist.PrefixStore("devices", store).check([str(rank)]))
