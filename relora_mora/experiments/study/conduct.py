"""Runs a whole study, or repeats one of its runs."""

import shutil
import sys
from collections.abc import Sequence
from typing import Never

from tqdm import tqdm

from relora_mora.experiments.study.design import Cell, Study, count, first_round, second_round
from relora_mora.experiments.study.folder import StudyFolder, cell_configs
from relora_mora.experiments.study.record import differences, final_metric, write_records
from relora_mora.experiments.study.runner import Runner


class CellsFailed(ValueError):
    """Some runs failed; the message has the last lines that they printed."""


def conduct(study: Study, folder: StudyFolder, program: Sequence[str], jobs: int) -> int:
    """Runs every cell that is not done, ``jobs`` at a time, and records each; returns the number of records.

    ``program`` is the command that trains, as arguments of Python. Before the first run it raises
    :class:`ConfigError` if any settings are wrong, and ValueError if a cell was started earlier with other settings or
    inputs. Raises :class:`Stopped` after a
    signal, and :class:`CellsFailed` if runs have failed and all others are done.
    """
    cells = first_round(study)
    folder.find_commits(cell_configs(study, cells, folder).values())
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


def run_again(study: Study, folder: StudyFolder, name: str, program: Sequence[str]) -> tuple[int, list[str]]:
    """Runs a finished cell a second time, in a separate folder; an interrupted repetition continues.

    Returns how many numbers were compared, and a line for each number that is not exactly the same.
    """
    cells = known_cells(study, folder)
    matching = [cell for cell in cells if cell.name == name and folder.is_done(cell)]
    if not matching:
        done = ", ".join(cell.name for cell in cells if folder.is_done(cell)) or "none"
        raise ValueError(f"--again: no finished run is called {name}; finished runs: {done}")
    [cell] = matching
    folder.begin(cell_configs(study, [cell], folder), study.threads)
    other = StudyFolder(folder.path / "again" / cell.name)
    if other.is_done(cell):
        shutil.rmtree(other.path)
    other.note_commits(folder.commits())
    other.begin(cell_configs(study, [cell], other), study.threads)
    with _bar(1, 0) as bar:
        Runner(study, other, program, 1, bar).run([cell])
    if not other.is_done(cell):
        raise CellsFailed(_end_of_log(cell, other))
    return differences(cell, folder, other)


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
