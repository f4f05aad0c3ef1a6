"""Joins the ranks of a run, each with its device.

A rank binds its device before the process group exists, because NCCL needs it.
"""

import contextlib
import datetime
import errno
import ipaddress
import json
import os
import re
import resource
import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from relora_mora.distributed.collectives import control_group, is_peer_failure, same_on_all_ranks
from relora_mora.system.hardware import uses_cuda
from relora_mora.system.process import keep_freed_memory

_GPU_REMEDY = "start one rank for each GPU, or compute on CPUs with DS_ACCELERATOR=cpu in the environment"
_WITHOUT_LAUNCHER = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
# torch's NCCL watchdog would abort the process before the watchdog of this package can name the lost rank
_NO_ABORTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # torchrun sets 1
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_DIST_USE_NCCL2": "0",  # torch 2.15 prefers it, and it has a watchdog of its own (pytorch#192105)
}
FEWEST_FILES = 34  # the fewest open files that a tiny run of one rank needs
PORT_SECONDS = 20.0  # to wait for a port: a run that was just killed may still hold it


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


class JoinError(RuntimeError):
    """The ranks could not connect to each other. The message says where this one looked for the others."""


def join(timeout_seconds: float) -> None:
    """Joins the process group unless this process has joined. A single process needs no launcher.

    On a CPU, it also makes the process keep the memory that it frees. ``timeout_seconds`` is how long to wait for the
    other ranks. Raises :class:`JoinError` if they do not connect, or if another program holds the port, and ValueError
    if the ranks and the GPUs do not fit together, or if the host allows too few open files.
    """
    if not dist.is_initialized():
        _allow_files()
        for name, value in _WITHOUT_LAUNCHER.items():
            os.environ.setdefault(name, value)
        try:
            _connect(timeout_seconds)
        except RuntimeError as error:
            if os.strerror(errno.EMFILE) in str(error):
                raise _too_few_files() from error
            raise
        if not uses_cuda():
            keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_on_host()))


def joined_within(timeout_seconds: float) -> float:
    """Seconds after which :func:`join` has failed. gloo itself has no timeout for connecting."""
    return 2 * timeout_seconds + 60


def _allow_files() -> None:
    """Allows as many open files as the host does: the first rank has several connections to every other rank.

    Raises ValueError if that is too few even for a single rank. Otherwise torch and gloo would fail in many ways.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # the kernel's own limit may be lower
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < FEWEST_FILES:
        raise _too_few_files()


def _too_few_files() -> ValueError:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ValueError(f"a process may have {most} files open on this host, too few for a rank; raise ulimit -n")


def _connect(timeout_seconds: float) -> None:
    os.environ.update(_NO_ABORTS)
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    address, port = store_address()
    if rank == 0 and port and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        _await_port(port)
    # for each collective; longer than the watchdog takes to name the rank that is late
    collective_timeout = datetime.timedelta(seconds=joined_within(timeout_seconds))
    begin = time.monotonic()
    try:
        store = _store_of_this_start(rank, timeout_seconds)
        device = bind_device(store, rank, world_size)
        dist.init_process_group(
            backend_name(),
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=collective_timeout,
            device_id=device if world_size > 1 else None,  # with it, NCCL connects now; a single rank has no peer
        )
        if world_size > 1:
            control_group()
    except dist.DistBackendError as error:
        detail = " ".join(str(error).split())
        raise JoinError(
            f"rank {rank} of {world_size}: {backend_name()} could not connect the ranks ({detail})"
        ) from error
    except dist.DistError as error:
        first = str(error).partition("\n")[0]
        raise JoinError(
            f"rank {rank} of {world_size} did not meet the others at {address}:{port} "
            f"in {time.monotonic() - begin:.0f} s ({first}); check that all ranks were started, "
            "and that they can reach MASTER_ADDR and MASTER_PORT through all firewalls"
        ) from error
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        detail = " ".join(str(error).split())
        raise JoinError(
            f"rank {rank} of {world_size} met the others at {address}:{port}, but could not connect ({detail}); "
            "unless one of them has ended, set GLOO_SOCKET_IFNAME to the network interface that leads to other hosts"
        ) from error


def _store_of_this_start(rank: int, timeout_seconds: float) -> dist.Store:
    """The store where the ranks meet. Skips the store of a job that has just ended: this rank is already in it."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        store, *_ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout_seconds)))
        with contextlib.suppress(dist.DistError):  # that store has just gone
            if rank == 0 or not has_met(store, rank):
                return store
        if time.monotonic() > deadline:
            return store
        del store
        time.sleep(0.5)


def _await_port(port: int) -> None:
    """Waits until the port can be bound. torch's own error does not say which port is in use, or what to do."""
    deadline = time.monotonic() + PORT_SECONDS
    while True:
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                if time.monotonic() > deadline:
                    raise JoinError(
                        f"port {port} (MASTER_PORT) is in use on this host ({error.strerror}): another job runs here; "
                        "end it, or choose another port (deepspeed --master_port, torchrun --master-port)"
                    ) from error
            else:
                return
        time.sleep(0.5)


def store_address() -> tuple[str, int]:
    """Host and port of the key-value store where the ranks meet."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def processes_on_host() -> int:
    """Ranks on this host, as torchrun, DeepSpeed's launcher or Slurm (in the form 8(x2),4) say; at most all ranks."""
    values = (os.environ.get(key, "") for key in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_TASKS_PER_NODE"))
    numbers = [int(number) for value in values for number in re.findall(r"\d+", value)[:1]]
    return max(1, min([*numbers[:1], int(os.environ.get("WORLD_SIZE", "1"))]))
