"""Worker processes that are started once per world size and run many functions, each on all ranks."""

import contextlib
import faulthandler
import gc
import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import pytest

from tests.tools.ports import free_port

LONGEST_SECONDS = 300.0  # a busy machine takes ten times as long as a quiet one
COLLECTIVE_SECONDS = 120  # then a rank that waits for the others fails
POLL_SECONDS = 0.5
STACKS_SIGNAL = signal.SIGUSR2
# one thread: the process that is forked must have no other either, so the libraries must see it when they are loaded
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


class PoolError(RuntimeError):
    """The workers cannot be used any more: one has died, or all of them hang. Each has written its stack to stderr."""


def _serve(rank: int, world_size: int, port: int, device: str, pipe: Connection) -> None:
    faulthandler.register(STACKS_SIGNAL, all_threads=True)  # of C: it needs no lock of the interpreter
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": device,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS does not look again when train.deterministic is set
        **ENVIRONMENT,
    }
    import torch

    from relora_mora.engine.start import init_distributed

    torch.set_num_threads(1)
    init_distributed(timeout_seconds=COLLECTIVE_SECONDS)
    while True:
        function, args, kwargs = pipe.recv()
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        gc.collect()
        gc.freeze()  # DeepSpeed keeps thousands of objects of each run


class Pool:
    """``pool(function, *args)`` runs a module-level function on every rank and returns the list of results, which holds
    no tensor of a GPU. ``device``: cpu or cuda.

    If a worker has died, or there is no answer for LONGEST_SECONDS, the others are ended (:class:`PoolError`).
    ``is_broken`` is true from then on, and after a collective that not all ranks have reached.
    """

    def __init__(self, world_size: int, device: str = "cpu") -> None:
        if device == "cpu":
            context: Any = mp.get_context("forkserver")
            context.set_forkserver_preload(["tests.tools.preloaded"])
            with mock.patch.dict(os.environ, ENVIRONMENT | {"DS_ACCELERATOR": device}):
                forkserver.ensure_running()
        else:
            context = mp.get_context("spawn")  # a process that has looked for GPUs may not be forked
        port = free_port()
        pipes = [context.Pipe() for _ in range(world_size)]
        self.is_broken = False
        self.pipes = [ours for ours, _ in pipes]
        given = [(rank, world_size, port, device, theirs) for rank, (_, theirs) in enumerate(pipes)]
        self.processes = [context.Process(target=_serve, args=each, daemon=True) for each in given]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        begin = time.monotonic()
        try:
            for pipe in self.pipes:
                pipe.send((function, args, kwargs))
            while not all(pipe.poll(POLL_SECONDS / len(self.pipes)) for pipe in self.pipes):  # an answer, or closed
                if time.monotonic() > begin + LONGEST_SECONDS or not all(map(mp.Process.is_alive, self.processes)):
                    raise EOFError
            answers = [pipe.recv() for pipe in self.pipes]
        except (BrokenPipeError, EOFError):
            raise self._broken(f"{function.__name__}{args} after {time.monotonic() - begin:.0f} s") from None
        failed = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        if failed:
            if time.monotonic() - begin > COLLECTIVE_SECONDS:
                self.close()
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def _broken(self, what: str) -> PoolError:
        lines = [f"{what}: not every rank has an answer; exit codes: {[each.exitcode for each in self.processes]}"]
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, STACKS_SIGNAL)
        time.sleep(2)  # until they have written their stacks
        for rank, pipe in enumerate(self.pipes):
            with contextlib.suppress(EOFError, OSError):
                if pipe.poll() and not (answer := pipe.recv())[0]:
                    lines.append(f"rank {rank} had failed:\n{answer[1]}")
        self.close()
        return PoolError("\n".join(lines))

    def close(self) -> None:
        """Ends the workers, which have nothing to lose: to leave politely takes them seconds."""
        self.is_broken = True
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def most_ranks(device: str) -> int:
    """How many ranks a pool may have: one for each GPU."""
    if device != "cuda":
        return 8
    import torch

    return torch.cuda.device_count()


class Pools:
    """``pools(world_size)``: a pool of as many workers, which is kept for the next who asks."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.by_size: dict[int, Pool] = {}

    def __call__(self, world_size: int) -> Pool:
        if world_size > most_ranks(self.device):
            pytest.skip(f"{world_size} ranks need as many GPUs")
        if world_size not in self.by_size or self.by_size[world_size].is_broken:
            self.by_size[world_size] = Pool(world_size, device=self.device)
        return self.by_size[world_size]

    def close(self) -> None:
        for pool in self.by_size.values():
            pool.close()
