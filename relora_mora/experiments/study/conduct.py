"""Runs a whole study, one process per cell and several at a time."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from relora_mora.experiments.compare.runs import read_run
from relora_mora.experiments.study.design import Cell, Study, count, first_round, second_round
from relora_mora.experiments.study.folder import StudyFolder, cell_configs, checked, final_metric
from relora_mora.system.bars import Bar, is_watched
from relora_mora.system.process import ending_with_me, say

# A run takes signals within a second as one request. It may get one from the launcher and then again from here.
POLL_SECONDS = 0.2


class CellsFailed(ValueError):
    """Some runs failed; the message has the last lines that they printed."""


class Stopped(Exception):
    """The study was stopped, and its runs have ended."""


def check_inputs(study: Study, folder: StudyFolder) -> None:
    """Checks the model, the text and the tokenizer of every known run that is not done, before the first run starts.

    Raises :class:`relora_mora.config.load.ConfigError` with the faults of all runs, each fault once.
    """
    from relora_mora.optim.own import with_rule  # late imports: they load torch
    from relora_mora.train.begin.inputs import open_text
    from relora_mora.train.begin.settings import check_model
    from relora_mora.weights.vocabulary import with_vocabulary

    configs = cell_configs(study, folder.missing(known_cells(study, folder)), folder)
    # text is opened only once for all runs that read the same text with the same model and tokenizer
    include: Any = {"data": True, "tokenizer": True, "model": {"config", "init_from", "adapter"}}
    texts = {
        config.model_dump_json(include=include, exclude={"data": {"seed"}}): (cell, config)
        for cell, config in reversed(configs.items())
    }
    checks: list[Any] = [(cell, (check_model, config)) for cell, config in configs.items()]
    checks += [(cell, (open_text, config)) for cell, config in texts.values()]
    checked(study, checks, lambda item: item[0](with_vocabulary(with_rule(item[1]))))


def conduct(study: Study, folder: StudyFolder, program: Sequence[str], jobs: int) -> int:
    """Runs every cell that is not done, ``jobs`` at a time; returns the number of cells.

    ``program`` is the command that trains, as arguments of Python. Before the first run it raises
    :class:`ConfigError` if any settings are wrong, and ValueError if a cell was started earlier with other settings or
    inputs. Raises :class:`Stopped` after a signal, and :class:`CellsFailed` if runs have failed and all others are
    done.
    """
    cells = first_round(study)
    with Bar("study", "run", total=count(study), after=0.0) as bar:

        def note(running: Sequence[Cell] = ()) -> None:
            names = " ".join(cell.name for cell in running)
            done = len(cells) - len(folder.missing(cells))
            bar.note(names)
            bar.update(done)
            if not is_watched():
                say(f"study: {done} of {count(study)} runs are done; running: {names or 'none'}")

        for choose in (False, True):
            if choose:
                cells = known_cells(study, folder)
            folder.begin(cell_configs(study, cells, folder))
            note()
            _run_cells(cells, folder, program, jobs, study.threads, note)
    if failed := folder.missing(cells):
        raise CellsFailed("\n".join(_end_of_log(cell, folder) for cell in failed))
    return len(cells)


def known_cells(study: Study, folder: StudyFolder) -> list[Cell]:
    """The cells of the first round, and those of the second round that the results so far choose."""
    cells = first_round(study)
    if study.choose is not None:
        runs = {cell: read_run(folder.run(cell).path) for cell in cells if folder.is_done(cell)}
        results = {cell: final_metric(run, study.choose.metric) for cell, run in runs.items()}
        cells += second_round(study, {cell: result for cell, result in results.items() if result is not None})
    return cells


def _run_cells(
    cells: Sequence[Cell],
    folder: StudyFolder,
    program: Sequence[str],
    jobs: int,
    threads: int,
    note: Callable[[Sequence[Cell]], object],
) -> None:
    """Runs the cells that are not done; interrupted cells continue from their last checkpoint.

    ``note`` is called with the running cells each time that they have changed. After SIGINT or SIGTERM, which is passed
    on to every run, this raises :class:`Stopped`; a run saves and ends at the first signal and ends immediately at the
    second. If this process is killed, the kernel sends each run a first signal (on Linux).
    """
    waiting = folder.missing(cells)
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    signals: list[int] = []
    passed_on = 0
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, lambda number, _: signals.append(number))
            stack.callback(signal.signal, number, before)
        while running or (waiting and not signals):
            known = list(running)
            while waiting and len(running) < jobs and not signals:
                cell = waiting.pop(0)
                running[cell] = _start(cell, folder, program, threads)
            started = list(running)  # a short run starts and ends within one turn
            time.sleep(POLL_SECONDS)
            while passed_on < len(signals):
                passed_on += 1
                for process in running.values():
                    process.send_signal(signal.SIGTERM)
            running = {cell: process for cell, process in running.items() if process.poll() is None}
            if not known == started == list(running):
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


def _end_of_log(cell: Cell, folder: StudyFolder) -> str:
    log = folder.log(cell)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    return "\n  ".join([f"{cell.name} did not finish; the end of {log}:", *lines])
