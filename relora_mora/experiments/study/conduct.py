"""Runs a whole study."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Never

from tqdm import tqdm

from relora_mora.experiments.study.design import Cell, Study, count, first_round, second_round
from relora_mora.experiments.study.folder import StudyFolder, cell_configs
from relora_mora.experiments.study.record import final_metric, write_records
from relora_mora.experiments.study.runner import Runner
from relora_mora.supervise.lock import LockError, RunLock


class CellsFailed(ValueError):
    """Some runs failed; the message has the last lines that they printed."""


def conduct(study: Study, folder: StudyFolder, program: Sequence[str], jobs: int) -> int:
    """Runs every cell that is not done, ``jobs`` at a time, and records each; returns the number of records.

    ``program`` is the command that trains, as arguments of Python. Before the first run it raises
    :class:`ConfigError` if any settings are wrong, and ValueError if another study works on the folder, or if a cell
    was started earlier with other settings or inputs. Raises :class:`Stopped` after a signal, and
    :class:`CellsFailed` if runs have failed and all others are done.
    """
    cells = first_round(study)
    configs = cell_configs(study, cells, folder)
    with _alone(folder):
        folder.find_commits(configs.values())
        folder.begin(cell_configs(study, cells, folder), study.threads)
        with _bar(count(study), sum(map(folder.fraction, cells))) as bar:
            runner = Runner(study, folder, program, jobs, bar, lambda: write_records(cells, folder))
            runner.run(cells)
            more = second_round(study, _results(study, cells, folder))
            cells += more
            folder.begin(cell_configs(study, cells, folder), study.threads)  # all of them begin with the same model
            runner.run(more)
        recorded = write_records(cells, folder)
    if recorded < len(cells):
        raise CellsFailed("\n".join(_end_of_log(cell, folder) for cell in cells if not folder.is_done(cell)))
    return recorded


def known_cells(study: Study, folder: StudyFolder) -> list[Cell]:
    """The cells of the first round, and those of the second round that the results so far choose."""
    first = first_round(study)
    return [*first, *second_round(study, _results(study, first, folder))]


@contextmanager
def _alone(folder: StudyFolder) -> Iterator[None]:
    """Holds the folder's lock, so that no other study starts the same runs."""
    lock = RunLock(folder.path)
    try:
        lock.acquire(wait_seconds=0)
    except LockError:
        raise ValueError(
            f"{folder.path}: another study works here; wait until it ends, stop it, or give another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _bar(total: int, done: float) -> "tqdm[Never]":
    """A progress bar over runs, with the remaining time at the speed since this start."""
    interval = 0.5 if sys.stderr.isatty() else 60.0  # seconds; a file gets a line each time
    form = "{percentage:3.0f}%|{bar}| {n:.2f} of {total} runs, {remaining} left{postfix}"
    return tqdm(total=total, initial=done, bar_format=form, dynamic_ncols=True, mininterval=interval, miniters=0)


def _results(study: Study, cells: list[Cell], folder: StudyFolder) -> dict[Cell, float]:
    if study.choose is None:
        return {}
    results = {cell: final_metric(cell, folder, study.choose.metric) for cell in cells}
    return {cell: result for cell, result in results.items() if result is not None}


def _end_of_log(cell: Cell, folder: StudyFolder) -> str:
    log = folder.log(cell)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    return "\n  ".join([f"{cell.name} did not finish; the end of {log}:", *lines])
