"""The processes of a run: joining them, and what the first one knows for all."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed looks

import deepspeed
import deepspeed.ops
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator


def init_distributed(timeout_seconds: float = 1800.0) -> tuple[int, int]:
    """Joins the process group and returns (rank, world size). One process needs no launcher.

    DeepSpeed's shared-memory collective for CPUs is switched off: training does not use it, and it compiles with g++.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that torch renames; it says so at every single call
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    if not dist.is_initialized():
        for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            os.environ.setdefault(key, value)
        with quiet():
            deepspeed.init_distributed(
                dist_backend=get_accelerator().communication_backend_name() if torch.cuda.is_available() else "gloo",
                timeout=datetime.timedelta(seconds=timeout_seconds),
                auto_mpi_discovery=False,
                verbose=False,
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _processes_on_host()))
    return dist.get_rank(), dist.get_world_size()


def from_first_rank(make: Callable[[], Any]) -> Any:
    """What ``make`` returns on the first rank, on every rank; its ValueError or OSError is raised on every rank. A collective."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [(True, make())]
        except (ValueError, OSError) as error:
            answer = [(False, error)]
    if dist.get_world_size() > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    good, value = answer[0]
    if not good:
        raise value
    return value


def _processes_on_host() -> int:
    """As torchrun, DeepSpeed's launcher and Slurm tell it."""
    told = [os.environ.get(key, "") for key in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_TASKS_PER_NODE")]
    return max([1, *(int(number) for value in told for number in re.findall(r"\d+", value)[:1])])  # Slurm: 8(x2),4


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed writes its set-up with print; its warnings still come through the logger."""
    if os.environ.get("DEEPSPEED_LOG_LEVEL"):
        yield
        return
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink):
        yield
