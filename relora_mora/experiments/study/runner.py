"""Runs the cells of a study, one process per cell and several at a time."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from relora_mora.experiments.study.design import Cell
from relora_mora.experiments.study.folder import StudyFolder
from relora_mora.system.process import ending_with_me

# A run takes signals within a second as one request. It may get one from the launcher and then again from here.
POLL_SECONDS = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The study was stopped, and its runs have ended."""


def run_cells(
    cells: Sequence[Cell],
    folder: StudyFolder,
    program: Sequence[str],
    jobs: int,
    threads: int,
    note: Callable[[Sequence[Cell]], object],
) -> None:
    """Runs the cells that are not done; interrupted cells continue from their last checkpoint.

    ``program`` is what Python gets as arguments, before the file with the cell's settings. The output of a run is in
    its log. ``note`` is called with the running cells each time that they have changed. After SIGINT or SIGTERM, which
    is passed on to every run, this raises :class:`Stopped`; a run saves and ends at the first signal and ends
    immediately at the second. If this process is killed, the kernel sends each run a first signal (on Linux).
    """
    waiting = [cell for cell in cells if not folder.is_done(cell)]
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    passed_on = 0
    with _stop_signals() as signals:
        while running or (waiting and not signals):
            known = len(waiting)
            while waiting and len(running) < jobs and not signals:
                cell = waiting.pop(0)
                running[cell] = _start(cell, folder, program, threads)
            time.sleep(POLL_SECONDS)
            while passed_on < len(signals):
                passed_on += 1
                for process in running.values():
                    process.send_signal(signal.SIGTERM)
            ended = [cell for cell, process in running.items() if process.poll() is not None]
            for cell in ended:
                del running[cell]
            if ended or len(waiting) < known:  # a short run starts and ends within one turn
                note(list(running))
    if signals:
        raise Stopped


def _start(cell: Cell, folder: StudyFolder, program: Sequence[str], threads: int) -> subprocess.Popen[bytes]:
    log = folder.log(cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            ending_with_me([*program, str(folder.settings(cell))]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C reaches it only through the study
        )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yields a list that collects the stop signals as they arrive."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
