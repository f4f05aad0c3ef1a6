"""Joins the ranks of a run, each with its device.

A rank binds its device before the process group exists, because NCCL needs it.
"""

import contextlib
import datetime
import errno
import os
import re
import resource
import time

import torch
from torch import distributed as dist

from relora_mora.distributed.collectives import control_group, is_peer_failure
from relora_mora.system.hardware import uses_cuda
from relora_mora.system.process import keep_freed_memory

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
CHECKS = (
    "check that all ranks were started, that no other job uses MASTER_PORT, that each rank has a GPU of its own if "
    "there are GPUs, that no firewall is between the hosts, and that GLOO_SOCKET_IFNAME names the network interface "
    "that leads to other hosts"
)
PORT_SECONDS = 20.0  # for the first rank to get the port: a run that was just killed may still hold it


def backend_name() -> str:
    """The backend for collectives on tensors of the device."""
    return "nccl" if uses_cuda() else "gloo"


def bind_device() -> torch.device | None:
    """Makes this rank's GPU the current one and returns it; None on CPUs.

    A rank that sees only one GPU takes that one: its launcher shows each rank one GPU. Sets LOCAL_RANK in the
    environment to the index of the GPU, because DeepSpeed computes on the device of that index. Raises ValueError if
    there is no GPU for this rank.
    """
    if not uses_cuda():
        if os.environ.get("DS_ACCELERATOR") == "cuda":
            raise ValueError("DS_ACCELERATOR=cuda in the environment, but torch sees no GPU; unset it to use CPUs")
        return None
    visible = torch.cuda.device_count()
    index = 0 if visible == 1 else int(os.environ["LOCAL_RANK"])
    if index >= visible:
        raise ValueError(
            f"LOCAL_RANK={index} in the environment, but only {visible} GPUs are visible; start one rank for each GPU, "
            "or compute on CPUs with DS_ACCELERATOR=cpu in the environment"
        )
    torch.cuda.set_device(index)
    os.environ["LOCAL_RANK"] = str(index)
    return torch.device("cuda", index)


class JoinError(RuntimeError):
    """The ranks did not join. The message says where this one looked, for how long, and what to check."""


def join(timeout_seconds: float) -> None:
    """Joins the process group unless this process has joined. A single process needs no launcher.

    On a CPU, it also makes the process keep the memory that it frees. ``timeout_seconds`` is how long to wait for the
    other ranks. Raises :class:`JoinError` if they do not connect, and ValueError if there is no GPU for this rank, or
    if the host allows too few open files.
    """
    if not dist.is_initialized():
        for name, value in _WITHOUT_LAUNCHER.items():
            os.environ.setdefault(name, value)
        os.environ.update(_NO_ABORTS)
        _connect(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_seconds)
        if not uses_cuda():
            keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_on_host()))


def joined_within(timeout_seconds: float) -> float:
    """Seconds after which :func:`join` has failed. gloo itself has no timeout for connecting."""
    return 2 * timeout_seconds + 60


def _connect(rank: int, world_size: int, timeout_seconds: float) -> None:
    device = bind_device()
    begin = time.monotonic()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # the kernel's own limit may be lower
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the first rank has connections to all others
    try:
        dist.init_process_group(
            backend_name(),
            store=_meet(rank, world_size, timeout_seconds),
            rank=rank,
            world_size=world_size,
            # for each collective; longer than the watchdog takes to name the rank that is late
            timeout=datetime.timedelta(seconds=joined_within(timeout_seconds)),
            device_id=device if world_size > 1 else None,  # with it, NCCL connects now; a single rank has no peer
        )
        if world_size > 1:
            control_group()
    except RuntimeError as error:
        if os.strerror(errno.EMFILE) in str(error):
            fault = f"a process may have {most} files open on this host, too few for a rank; raise ulimit -n"
            raise ValueError(fault) from error
        if not is_peer_failure(error):
            raise
        address, port = store_address()
        fault = f"rank {rank} of {world_size} did not join the others at {address}:{port}"
        seconds = time.monotonic() - begin
        raise JoinError(f"{fault} in {seconds:.0f} s ({' '.join(str(error).split())}); {CHECKS}") from error


def _meet(rank: int, world_size: int, timeout_seconds: float) -> dist.Store:
    """The store where the ranks meet, once all of them are there.

    A job that has just ended may still hold the port. So the first rank tries again for ``PORT_SECONDS``, and the
    others leave a store in which they have been.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    deadline = time.monotonic() + (PORT_SECONDS if rank == 0 else timeout_seconds)
    while True:
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=timeout))
            if store.add(f"met/{rank}", 1) == 1 or time.monotonic() > deadline:
                store.wait([f"met/{other}" for other in range(world_size)], timeout)
                return store
            del store  # which closes the connection
        except dist.DistNetworkError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def store_address() -> tuple[str, int]:
    """Host and port of the key-value store where the ranks meet."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def processes_on_host() -> int:
    """Ranks on this host, as torchrun, DeepSpeed's launcher or Slurm (in the form 8(x2),4) say; at most all ranks."""
    values = (os.environ.get(key, "") for key in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_TASKS_PER_NODE"))
    numbers = [int(number) for value in values for number in re.findall(r"\d+", value)[:1]]
    return max(1, min([*numbers[:1], int(os.environ.get("WORLD_SIZE", "1"))]))
