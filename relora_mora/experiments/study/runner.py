"""Runs the cells of a study, one process per cell and several at a time, with one progress bar."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Never

from tqdm import tqdm

from relora_mora.experiments.study.design import Cell, Study
from relora_mora.experiments.study.folder import StudyFolder
from relora_mora.supervise.lock import is_held
from relora_mora.system.process import ending_with_me

POLL_SECONDS = 0.5
PASS_ON_SECONDS = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The study was stopped, and its runs have ended."""


@dataclass(frozen=True)
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    sent: list[int] = field(default_factory=list)  # signals passed on so far


class Runner:
    """Starts a program for each cell with the cell's settings file, and shows the progress of all cells.

    ``program`` is what Python gets as arguments. ``note`` is called each time that runs have ended.
    """

    def __init__(
        self,
        study: Study,
        folder: StudyFolder,
        program: Sequence[str],
        jobs: int,
        bar: "tqdm[Never]",
        note: Callable[[], object] = lambda: None,
    ) -> None:
        self.study = study
        self.folder = folder
        self.program = program
        self.jobs = jobs
        self.bar = bar
        self.note = note
        self._done = 0

    def run(self, cells: Sequence[Cell]) -> None:
        """Runs the cells that are not done; interrupted cells continue from their last checkpoint.

        A cell whose run is still ending, because it may outlive its study while it saves, waits for that end. The
        output of a failed run is in its log. After SIGINT or SIGTERM, which is passed on to every run, this raises
        :class:`Stopped`; a run saves and ends at the first signal and ends immediately at the second. If this process
        is killed, the kernel sends each run a first signal (on Linux).
        """
        waiting = [cell for cell in cells if not self.folder.is_done(cell)]
        self._done += len(cells) - len(waiting)
        running: list[_Running] = []
        with _stop_signals() as signals, _passing_on(signals, running):
            while running or (waiting and not signals):
                free = [cell for cell in waiting if not is_held(self.folder.run(cell).path)]
                for cell in [] if signals else free[: self.jobs - len(running)]:
                    waiting.remove(cell)
                    running.append(self._start(cell))
                time.sleep(POLL_SECONDS)
                ended = [one for one in running if one.process.poll() is not None]
                running[:] = [one for one in running if one not in ended]
                self._done += sum(self.folder.is_done(one.cell) for one in ended)
                if ended:
                    self.note()
                self._show(waiting, running)
        self._show(waiting, running)
        if signals:
            raise Stopped

    def _start(self, cell: Cell) -> _Running:
        log = self.folder.log(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                ending_with_me([*self.program, str(self.folder.settings(cell))]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(self.study.threads), "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C reaches it only through the study
            )
        return _Running(cell, process)

    def _show(self, waiting: list[Cell], running: list[_Running]) -> None:
        unfinished = [*waiting, *(one.cell for one in running)]
        done = self._done + sum(map(self.folder.fraction, unfinished))
        self.bar.set_postfix_str(" ".join(one.cell.name for one in running), refresh=False)
        self.bar.update(done - self.bar.n)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yields a list that collects the stop signals as they arrive."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _passing_on(signals: list[int], running: list[_Running]) -> Iterator[None]:
    """Passes each signal on to all runs.

    If a signal goes to the whole job, the runs get it directly, too. Passing it on soon enough keeps a run from taking
    it for a second request.
    """
    over = threading.Event()

    def pass_on() -> None:
        while not over.wait(PASS_ON_SECONDS):
            for one in list(running):
                for number in signals[len(one.sent) :]:
                    one.process.send_signal(signal.SIGTERM)
                    one.sent.append(number)

    thread = threading.Thread(target=pass_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
