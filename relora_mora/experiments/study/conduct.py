"""Runs a whole study."""

from collections.abc import Sequence

from relora_mora.experiments.study.design import Cell, Study, count, first_round, second_round
from relora_mora.experiments.study.folder import StudyFolder, cell_configs
from relora_mora.experiments.study.record import final_metric, write_records
from relora_mora.experiments.study.runner import run_cells
from relora_mora.system.bars import Bar, is_watched
from relora_mora.system.process import say


class CellsFailed(ValueError):
    """Some runs failed; the message has the last lines that they printed."""


def conduct(study: Study, folder: StudyFolder, program: Sequence[str], jobs: int) -> int:
    """Runs every cell that is not done, ``jobs`` at a time, and records each; returns the number of records.

    ``program`` is the command that trains, as arguments of Python. Before the first run it raises
    :class:`ConfigError` if any settings are wrong, and ValueError if a cell was started earlier with other settings or
    inputs. Raises :class:`Stopped` after a signal, and :class:`CellsFailed` if runs have failed and all others are
    done.
    """
    cells = first_round(study)
    folder.find_commits(cell_configs(study, cells, folder).values())
    with Bar("study", "run", total=count(study), after=0.0) as bar:

        def note(running: Sequence[Cell] = ()) -> None:
            write_records(cells, folder)
            names = " ".join(cell.name for cell in running)
            done = sum(map(folder.is_done, cells))
            bar.note(names)
            bar.update(done)
            if not is_watched():
                say(f"study: {done} of {count(study)} runs are done; running: {names or 'none'}")

        for choose in (False, True):
            if choose:
                cells = known_cells(study, folder)
            folder.begin(cell_configs(study, cells, folder), study.threads)  # all of them begin with the same model
            note()
            run_cells(cells, folder, program, jobs, study.threads, note)
    failed = [cell for cell in cells if not folder.is_done(cell)]
    if failed:
        raise CellsFailed("\n".join(_end_of_log(cell, folder) for cell in failed))
    return len(cells)


def known_cells(study: Study, folder: StudyFolder) -> list[Cell]:
    """The cells of the first round, and those of the second round that the results so far choose."""
    cells = first_round(study)
    write_records(cells, folder)
    if study.choose is None:
        return cells
    kept = folder.kept()
    results = {cell: final_metric(kept[cell.name], study.choose.metric) for cell in cells if cell.name in kept}
    cells += second_round(study, {cell: result for cell, result in results.items() if result is not None})
    write_records(cells, folder)
    return cells


def _end_of_log(cell: Cell, folder: StudyFolder) -> str:
    log = folder.log(cell)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    return "\n  ".join([f"{cell.name} did not finish; the end of {log}:", *lines])
