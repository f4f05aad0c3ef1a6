"""A study from its first run to its last, and one run of it made again."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Never

from tqdm import tqdm

from relora_mora.experiments.study.design import Cell, Study, count, first_round, second_round
from relora_mora.experiments.study.folder import StudyFolder, cell_configs
from relora_mora.experiments.study.record import differences, final_metric, write_records
from relora_mora.experiments.study.runner import Runner


class CellsFailed(ValueError):
    """Some runs ended with an error; the message has the last lines that they printed."""


def conduct(study: Study, folder: StudyFolder, program: Path, jobs: int) -> int:
    """Runs what is not done, ``jobs`` runs at a time, and keeps a record of each; returns how many there are.

    ``program`` is the script that trains. Raises :class:`ConfigError` before the first run where
    settings of any are wrong, ValueError where they, or the model to begin with, are not those of runs before,
    :class:`Stopped` after a signal, and :class:`CellsFailed` when all other runs are done.
    """
    cells = first_round(study)
    folder.find_commits(cell_configs(study, cells, folder).values())
    folder.begin(cell_configs(study, cells, folder), study.threads)
    already = sum(map(folder.fraction, cells))
    with _bar(count(study), already) as bar:
        runner = Runner(study, folder, program, jobs, bar, lambda: write_records(cells, folder))
        runner.run(cells)
        more = second_round(study, _results(study, cells, folder))
        cells += more
        folder.begin(cell_configs(study, cells, folder), study.threads)  # all of them begin with the same model
        runner.run(more)
    kept = write_records(cells, folder)
    if kept < len(cells):
        raise CellsFailed("\n".join(_last_words(cell, folder) for cell in cells if not folder.is_done(cell)))
    return kept


def known_cells(study: Study, folder: StudyFolder) -> list[Cell]:
    """Those of the first round, and of the second what the results that are there choose."""
    first = first_round(study)
    return [*first, *second_round(study, _results(study, first, folder))]


def run_again(study: Study, folder: StudyFolder, name: str, program: Path) -> tuple[int, list[str]]:
    """Runs a cell that is done a second time, in a folder of its own; one that was cut there goes on.

    Returns how many numbers were compared, and a line for each that is not exactly the same.
    """
    cells = known_cells(study, folder)
    found = [cell for cell in cells if cell.name == name and folder.is_done(cell)]
    if not found:
        done = ", ".join(cell.name for cell in cells if folder.is_done(cell)) or "none"
        raise ValueError(f"--again: no run {name} that is done; there are: {done}")
    [cell] = found
    folder.begin(cell_configs(study, [cell], folder), study.threads)
    other = StudyFolder(folder.path / "again" / cell.name)
    if other.is_done(cell):
        shutil.rmtree(other.path)
    other.note_commits(folder.commits())
    other.begin(cell_configs(study, [cell], other), study.threads)
    with _bar(1, 0) as bar:
        Runner(study, other, program, 1, bar).run([cell])
    if not other.is_done(cell):
        raise CellsFailed(_last_words(cell, other))
    return differences(cell, folder, other)


def _bar(total: int, done: float) -> tqdm[Never]:
    """Counts runs, with the time that is left at the speed of this start."""
    interval = 0.5 if sys.stderr.isatty() else 60.0  # seconds; a file gets a line each time
    form = "{percentage:3.0f}%|{bar}| {n:.2f} of {total} runs, {remaining} left{postfix}"
    return tqdm(total=total, initial=done, bar_format=form, dynamic_ncols=True, mininterval=interval, miniters=0)


def _results(study: Study, cells: list[Cell], folder: StudyFolder) -> dict[Cell, float]:
    if study.choose is None:
        return {}
    results = {cell: final_metric(cell, folder, study.choose.metric) for cell in cells}
    return {cell: result for cell, result in results.items() if result is not None}


def _last_words(cell: Cell, folder: StudyFolder) -> str:
    log = folder.log(cell)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    return "\n  ".join([f"{cell.name} is not done; the end of {log}:", *lines])
