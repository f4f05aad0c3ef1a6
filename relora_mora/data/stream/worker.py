"""The program of a worker process, which prepares the batches of an assignment ahead of the trainer.

It ignores the signals that ask a job to stop, because the trainer still needs batches to finish its step. The trainer
kills it (``worker_process.py``), and it also dies with its parent.
"""

import os
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from relora_mora.data.errors import SourceError, WorkerError
from relora_mora.data.stream.producer import Assignment, LaneBlocks, Producer
from relora_mora.data.stream.worker_process import IGNORED_SIGNALS
from relora_mora.system.files import LOST_DISK
from relora_mora.system.process import end_with_parent

Answers = queue.Queue[LaneBlocks | Exception]  # an exception is the last answer


def main(descriptor: int, parent: int) -> None:
    """``descriptor`` is this end of the pipe, ``parent`` the process id of the trainer."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    end_with_parent(parent, signal.SIGKILL)
    # tokenizing needs no torch, but transformers would import it: 190 MB and more than a second in every worker
    sys.modules["torch"] = None  # type: ignore[assignment]
    connection = Connection(descriptor)
    assignment: Assignment = connection.recv()
    # the queue holds the batches prepared ahead; the pipe holds at most a part of a batch
    answers: Answers = queue.Queue(maxsize=assignment.config.prefetch_batches)
    threading.Thread(target=_send_all, args=(connection, answers), daemon=True).start()
    try:
        producer = Producer(assignment)
        while True:
            answers.put(producer.produce())
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
