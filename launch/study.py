"""Runs a grid of settings over a base config: ``python launch/study.py STUDY.yaml``. See docs/studies.md."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from relora_mora.cli.arguments import PositiveInt
    from relora_mora.cli.command import run
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None

LAUNCH = Path(__file__).resolve().parent


def main(study: str, *, out: str | None = None, jobs: PositiveInt = 1, again: str | None = None) -> int:
    """Runs everything in a study that is not done yet; an interrupted run continues where it stopped.

    Each run has a complete run folder in OUT/runs, its output is in OUT/logs, and finished runs have a record in
    OUT/cells.jsonl. In the end, the command writes a table (OUT/compare.md) and figures.

    Args:
        study: a YAML file such as configs/study/memory_tiny.yaml
        out: the folder of the study; default: runs/studies/NAME
        jobs: number of runs at the same time
        again: the name of a finished run, to run it again and compare all its numbers
    """
    from relora_mora.experiments.compare.files import check_plots
    from relora_mora.experiments.compare.runs import CompareError
    from relora_mora.experiments.study.conduct import CellsFailed, conduct, run_again
    from relora_mora.experiments.study.design import read_study
    from relora_mora.experiments.study.folder import StudyFolder
    from relora_mora.experiments.study.runner import Stopped
    from relora_mora.supervise.exits import REQUEUE

    plan = read_study(study)
    folder = StudyFolder(Path(out or f"runs/studies/{Path(study).stem}"))
    program = LAUNCH / f"{plan.command}.py"
    try:
        if again is not None:
            numbers, different = run_again(plan, folder, again, program)
            print("".join(f"{line}\n" for line in different), end="")
            print(f"different: {len(different)} of {numbers:,} numbers")
            return 1 if different else 0
        check_plots(folder.path)
        from relora_mora.experiments.study.check import check_inputs  # loads torch, which takes seconds

        check_inputs(plan, folder)
        cells = conduct(plan, folder, program, jobs)
    except Stopped:
        sys.stderr.write("stopped; run the same command again to continue\n")
        return REQUEUE
    except CellsFailed:
        if folder.kept():
            try:
                _write_table(folder.records, folder.table)
            except CompareError as error:
                sys.stderr.write(f"{error}\n")
        raise
    _write_table(folder.records, folder.table)
    print(f"done: {cells}; {folder.records}, {folder.table}")
    return 0


def _write_table(records: Path, file: Path) -> None:
    """Prints the table of the finished runs, and writes it as ``file``, with their figures next to it."""
    from relora_mora.experiments.compare.figures import figures_of
    from relora_mora.experiments.compare.files import write_files
    from relora_mora.experiments.compare.groups import group_runs
    from relora_mora.experiments.compare.runs import read_runs
    from relora_mora.experiments.compare.table import compare, markdown

    groups = group_runs(read_runs(records))
    table = markdown(compare(groups))
    write_files(file.parent, {file.name: table}, figures_of(groups))
    print(table, end="", flush=True)


if __name__ == "__main__":
    run(main)
