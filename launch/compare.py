"""Runs beside each other: ``python launch/compare.py runs/full runs/remora --out=comparison``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

try:
    from relora_mora.cli.command import run
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None


def main(
    *runs: str,
    out: str | None = None,
    against: str | None = None,
    reach: str | None = None,
    unnamed: str = "",
    best: str = "",
) -> None:
    """Prints a table of runs in Markdown; runs that share all settings but the seed are one row, their mean.

    Args:
        runs: run folders, or the cells.jsonl of a study; the perplexities of all are given as multiples of the first's
        out: a folder for compare.md, compare.json and plots as PNG; it is made, and what it has of these is replaced
        against: the run folder, or the name of a study's run, that all are compared with in place of the first
        reach: a metric and values, such as eval/character_accuracy=0.5,0.95: adds the steps at which it reached them,
            and a plot of the metric
        unnamed: settings that rows are not named after, such as optim.lr,optim.restart_warmup_steps
        best: settings such as optim.lr; of rows that differ in these alone, the one with most seeds or else the lowest
            validation loss is left
    """
    from relora_mora.experiments.compare.figures import figures_of
    from relora_mora.experiments.compare.files import check_plots, write_files
    from relora_mora.experiments.compare.groups import group_of, group_runs
    from relora_mora.experiments.compare.reach import parse_reach, reach_notes, step_cells
    from relora_mora.experiments.compare.runs import CompareError, is_model, read_run, read_runs
    from relora_mora.experiments.compare.table import as_json, compare, markdown

    if not runs:
        raise CompareError("no run given; give run folders, e.g. runs/full runs/remora")
    if out is not None:
        check_plots(Path(out))
    folders = [Path(name) for name in runs]
    models = [folder for folder in folders if is_model(folder)]
    if len(models) < len(folders):
        folders = [folder for folder in folders if folder not in models]
        for model in models:
            print(f"{model}: a model and no run; left out", file=sys.stderr)
    found = {each.folder.resolve(): each for folder in folders for each in read_runs(folder)}
    if against is not None and not any(each.is_named(against) for each in found.values()):
        found[Path(against).resolve()] = read_run(Path(against))
    groups = group_runs(found.values(), *(_names(option) for option in (unnamed, best)))
    reference = None if against is None else group_of(groups, against)
    rows = compare(groups, reference)
    reached = None if reach is None else parse_reach(reach, groups)
    columns, notes = ({}, []) if reached is None else (step_cells(reached, groups), reach_notes(reached, groups))
    table = markdown(rows, reference, columns, notes)
    print(table, end="", flush=True)
    if out is None:
        return
    texts = {"compare.md": table, "compare.json": json.dumps(as_json(rows, reference), indent=1) + "\n"}
    write_files(Path(out), texts, figures_of(groups, reached, reference))


def _names(option: str) -> list[str]:
    return [name.strip() for name in option.split(",") if name.strip()]


if __name__ == "__main__":
    run(main)
