"""Compares runs in a table, and in figures."""

import sys
from pathlib import Path

from relora_mora.system.process import many_imports


def main(
    *runs: str,
    out: str | None = None,
    against: str | None = None,
    unnamed: str = "",
    best: str = "",
) -> None:
    """Prints a Markdown table of runs, and draws figures of them.

    Runs that differ only in the seed share a row with their mean.

    Arguments:
        runs: run folders, or the cells.jsonl of a study, also compressed (NAME.jsonl.gz); perplexities are also given
            as multiples of the first run's

    Options:
        out: a folder for compare.md and, if matplotlib is installed, figures as PNG; it is created if needed, and these
            files in it are replaced
        against: the run folder, or the name of a study's run, to compare with instead of the first run
        unnamed: settings to leave out of the names of rows, such as optim.lr,optim.restart_warmup_steps
        best: settings such as optim.lr; of rows that differ only in these settings, keeps the one with the most seeds
            or else the lowest validation loss

    Example:
        relora-mora compare runs/tiny_full runs/tiny_remora --out=compared
    """
    with many_imports():
        from relora_mora.experiments.compare.groups import group_of, group_runs
        from relora_mora.experiments.compare.runs import CompareError, is_model, read_run, read_runs
        from relora_mora.experiments.compare.table import check_folder, markdown, write_comparison

    if not runs:
        raise CompareError("no runs given; give run folders, e.g. runs/full runs/remora")
    if out is not None:
        check_folder(Path(out))
    folders = [Path(name) for name in runs]
    models = [folder for folder in folders if is_model(folder)]
    if len(models) < len(folders):
        folders = [folder for folder in folders if folder not in models]
        for model in models:
            print(f"{model}: a model, not a run; left out", file=sys.stderr)
    by_folder = {each.folder.resolve(): each for folder in folders for each in read_runs(folder)}
    if against is not None and not any(each.is_named(against) for each in by_folder.values()):
        by_folder[Path(against).resolve()] = read_run(Path(against))
    settings = [[name.strip() for name in option.split(",") if name.strip()] for option in (unnamed, best)]
    groups = group_runs(by_folder.values(), *settings)
    reference = None if against is None else group_of(groups, against)
    table = markdown(groups, reference)
    print(table, end="", flush=True)
    if out is not None:
        write_comparison(Path(out), table, groups, reference)
