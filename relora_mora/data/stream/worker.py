"""A worker process, which prepares the batches of an assignment ahead of the trainer: both of its ends.

The process is a fresh interpreter. It is not a fork, because the trainer has threads and may hold an accelerator, and
not multiprocessing's spawn, which would import the trainer's script again, and with it torch and deepspeed. It ignores
the signals that ask a job to stop, because the trainer still needs batches to finish its step. The trainer kills it,
and it also dies with its parent.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import Connection, Pipe

import psutil

from relora_mora.data.errors import SourceError, WorkerError
from relora_mora.data.stream.producer import Assignment, LaneBlocks, produce
from relora_mora.system.files import LOST_DISK
from relora_mora.system.process import end_with_parent

PROGRAM = "relora_mora.data.stream.worker"
IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
KILL_SECONDS = 5.0  # time for a killed process to disappear
# one thread each, since there are several workers; no warning from transformers that torch is missing
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
Answers = queue.Queue[LaneBlocks | Exception]  # an exception is the last answer


class WorkerProcess:
    """``produce()`` returns the blocks of ``producer.produce()`` in their order, and raises its error.

    It raises a WorkerError if the worker was killed, or failed for a reason other than the user's input.
    """

    def __init__(self, assignment: Assignment) -> None:
        self._connection, theirs = Pipe(duplex=False)
        imports = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # from where this process imports
        # the child inherits the blocked signals, so none of them can end it before it ignores them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            with tempfile.TemporaryFile() as work:
                pickle.dump(assignment, work)
                work.seek(0)
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", PROGRAM, str(theirs.fileno()), str(os.getpid())],
                    stdin=work,
                    pass_fds=[theirs.fileno()],
                    env=os.environ | _ENVIRONMENT | imports,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._failure: Exception | None = None
        self._cpu_seconds = -1.0  # of the process when it last made progress
        self._worked_at = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_dead(self) -> bool:
        return self._process.poll() is not None

    def produce(self) -> LaneBlocks:
        if self._failure is None:
            try:
                answer = self._connection.recv()
            except (EOFError, OSError):
                answer = self._death()
            if isinstance(answer, LaneBlocks):
                self._cpu_seconds = -1.0
                return answer
            self._failure = answer
        raise self._failure

    def ready(self, timeout_seconds: float) -> bool:
        return self._failure is not None or self._connection.poll(timeout_seconds)

    def hung(self, seconds: float) -> WorkerError | None:
        """The error to raise if the process has used no processor time for so many seconds and has no answer ready.

        Call this repeatedly: the time is only measured during a call.
        """
        try:
            used = sum(psutil.Process(self.pid).cpu_times()[:2])
        except psutil.Error:  # gone: see is_dead
            return None
        now = time.monotonic()
        if used != self._cpu_seconds or self.ready(0.0):
            self._cpu_seconds = used
            self._worked_at = now
        idle = now - self._worked_at
        if idle <= seconds:
            return None
        return WorkerError(
            f"data worker {self.pid} hangs: it has done nothing for {idle:.0f} s (data.timeout_seconds plus a minute); "
            "check whether it was stopped, or a network file system does not answer"
        )

    def close(self) -> None:
        self._process.kill()
        # it cannot die while it reads from a disk that does not answer
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)
        self._connection.close()

    def _death(self) -> WorkerError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return WorkerError(
            f"data worker {self.pid} {how}; "
            "if memory ran out, lower data.workers, data.lanes, data.shuffle_documents or data.max_line_bytes"
        )


def main(descriptor: int, parent: int) -> None:
    """The worker's end: its work is in stdin, ``descriptor`` is the pipe's, ``parent`` the trainer's process id."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    end_with_parent(parent, signal.SIGKILL)
    # tokenizing needs no torch, but transformers would import it: 190 MB and more than a second in every worker
    sys.modules["torch"] = None  # type: ignore[assignment]
    connection = Connection(descriptor, readable=False)
    assignment: Assignment = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the trainer
    # the queue holds the batches prepared ahead; the pipe holds at most a part of a batch
    answers: Answers = queue.Queue(maxsize=assignment.config.prefetch_batches)
    threading.Thread(target=_send_all, args=(connection, answers), daemon=True).start()
    try:
        for blocks in produce(assignment):
            answers.put(blocks)
    except Exception as error:
        answers.put(_error_for_trainer(error))
    threading.Event().wait()  # until the parent kills this process, so that the last answer gets through


def _error_for_trainer(error: Exception) -> Exception:
    """The error that the trainer raises, with the same message as without workers."""
    # SourceError and TokenizerError are ValueErrors
    if isinstance(error, ValueError) and type(error).__module__.startswith("relora_mora."):
        return SourceError(str(error))
    if isinstance(error, OSError) and error.errno in LOST_DISK:
        return error
    return WorkerError(f"a data worker failed:\n{''.join(traceback.format_exception(error))}")


def _send_all(connection: Connection, answers: Answers) -> None:
    while True:
        try:
            connection.send(answers.get())
        except OSError:  # the parent closed its end
            os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
