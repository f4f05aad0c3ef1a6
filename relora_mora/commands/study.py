"""Runs a grid of settings over a base config (docs/studies.md)."""

import contextlib
import sys
from pathlib import Path

from relora_mora.cli.arguments import PositiveInt
from relora_mora.commands.compare import main as compare
from relora_mora.system.bars import Bar
from relora_mora.system.process import many_imports


def main(study: str, *, out: str | None = None, jobs: PositiveInt = 1) -> int:
    """Runs a grid of settings, and writes a table and figures.

    It runs everything that is not done yet; an interrupted run continues where it stopped. Each run has a complete run
    folder in OUT/runs, and its output is in OUT/logs. The table is OUT/compare.md.

    Arguments:
        study: a YAML file, or the name of a shipped one (relora-mora configs)

    Options:
        out: the folder of the study; default: runs/studies/NAME
        jobs: number of runs at the same time

    Example:
        relora-mora study memory_tiny --jobs=2
    """
    with many_imports():
        from relora_mora.experiments.compare.runs import TABLE
        from relora_mora.experiments.study.conduct import CellsFailed, Stopped, check_inputs, conduct, known_cells
        from relora_mora.experiments.study.design import read_study
        from relora_mora.experiments.study.folder import StudyFolder
        from relora_mora.supervise.exits import REQUEUE

    def table() -> None:
        done = [cell for cell in known_cells(plan, folder) if folder.is_done(cell)]
        compare(*(str(folder.run(cell).path) for cell in done), out=str(folder.path))

    plan = read_study(study)
    folder = StudyFolder(Path(out or f"runs/studies/{Path(study).stem}"))
    program = ["-m", "relora_mora", plan.command]
    try:
        with Bar("checking the inputs of all runs"):
            check_inputs(plan, folder)
        cells = conduct(plan, folder, program, jobs)
    except Stopped:
        sys.stderr.write("stopped; run the same command again to continue\n")
        return REQUEUE
    except CellsFailed:
        with contextlib.suppress(ValueError):
            table()
        raise
    table()
    print(f"done: {cells}; {folder.path / 'runs'}, {folder.path / TABLE}")
    return 0
