"""A worker process: the lanes of a task, tokenized ahead of the trainer.

It is a fresh interpreter, not a fork (the trainer has threads and may hold an accelerator) and not multiprocessing's spawn (which
would import the trainer's script, and with it torch and deepspeed, once more in each). It ignores the signals that ask a
job to stop: the trainer still needs batches to finish its step; it is killed on ``close()`` and dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import psutil

from relora_mora.data.errors import SourceError, WorkerError
from relora_mora.data.producer import Part, Producer, Task
from relora_mora.system.disk_errors import LOST_DISK

IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
KILL_SECONDS = 5.0  # for a killed process to be gone
# one thread each: the workers are the parallelism. transformers need not say that it misses torch
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """The parent's end. ``produce()`` gives and raises what ``Producer.produce()`` would, in the same order.

    A worker that was killed, or failed for another reason than the user's input, is a WorkerError.
    """

    def __init__(self, task: Task) -> None:
        self._connection, theirs = Pipe()
        environment = os.environ | _ENVIRONMENT
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        # the child inherits the blocked signals, so that none can end it before it ignores them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._task: Task | None = task
        self._failure: Exception | None = None
        self._used, self._since = -1.0, 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_dead(self) -> bool:
        return self._process.poll() is not None

    def start(self) -> None:
        """Hand over the task. Apart from the constructor, so that several workers can come up at once."""
        try:
            self._connection.send(self._task)
        except OSError as error:
            raise self._death() from error
        self._task = None

    def produce(self) -> Part:
        if self._failure is None:
            try:
                answer = self._connection.recv()
            except (EOFError, OSError):
                answer = self._death()
            if isinstance(answer, Part):
                self._used = -1.0
                return answer
            self._failure = answer
        raise self._failure

    def ready(self, timeout_seconds: float) -> bool:
        return self._failure is not None or self._connection.poll(timeout_seconds)

    def idle_seconds(self) -> float:
        """For how long the process has used no processor time, seen from call to call, while nothing of it waits to be read."""
        try:
            used = sum(psutil.Process(self.pid).cpu_times()[:2])
        except psutil.Error:  # gone: see is_dead
            return 0.0
        now = time.monotonic()
        if used != self._used or self.ready(0.0):
            self._used, self._since = used, now
        return now - self._since

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # it cannot die inside a read of a disk that does not answer
            self._process.wait(KILL_SECONDS)
        self._connection.close()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()

    def _death(self) -> WorkerError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return WorkerError(
            f"data worker {self.pid} {how}; if memory ran out, lower data.workers, data.lanes, data.shuffle_documents or data.max_line_bytes"
        )


def main(descriptor: int, parent: int) -> None:
    """The child's end: ``descriptor`` is its side of the pipe, ``parent`` the process to die with."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before it could be watched
        os._exit(1)
    # tokenizing needs no torch, but transformers imports it where it can: 190 MB and more than a second in every worker
    sys.modules["torch"] = None  # type: ignore[assignment]
    connection = Connection(descriptor)
    task: Task = connection.recv()
    # the queue holds the batches prepared ahead; the pipe holds at most a part of one
    ready: queue.Queue[Any] = queue.Queue(maxsize=task.config.prefetch_batches)
    threading.Thread(target=_send_all, args=(connection, ready), daemon=True).start()
    try:
        producer = Producer(task)
        while True:
            ready.put(producer.produce())
    except ValueError as error:
        # the trainer tells the user, as it would without workers: SourceError and TokenizerError are ValueErrors
        known = type(error).__module__.startswith("relora_mora.")
        ready.put(SourceError(str(error)) if known else _failed())
    except OSError as error:
        ready.put(error if error.errno in LOST_DISK else _failed())
    except Exception:
        ready.put(_failed())
    threading.Event().wait()  # the last message must get through; the parent ends this process


def _failed() -> WorkerError:
    return WorkerError(f"a data worker failed:\n{traceback.format_exc()}")


def _send_all(connection: Connection, ready: queue.Queue[Any]) -> None:
    while True:
        try:
            connection.send(ready.get())
        except OSError:  # the parent closed its end
            os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
