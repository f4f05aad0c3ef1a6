"""Compares runs in a table, and in figures."""

import itertools
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

    Runs that differ only in the seed share a row with their mean. What is not a run is left out.

    Arguments:
        runs: run folders, or the folder of a study for all its runs; perplexities are also given as multiples of the
            first run's

    Options:
        out: a folder for compare.md and, if matplotlib is installed, figures as PNG; it is created if needed, and these
            files in it are replaced
        against: which of them to compare with instead of the first run: its folder, or the name of a study's run
        unnamed: settings to leave out of the names of rows, such as optim.lr,optim.restart_warmup_steps
        best: settings such as optim.lr; of rows that differ only in these settings, keeps the one with the most seeds
            or else the lowest validation loss

    Example:
        relora-mora compare runs/tiny_full runs/tiny_remora --out=compared
    """

    def draw() -> dict[str, bytes]:
        from relora_mora.experiments.compare.figures import loss_figure, perplexity_figure, png

        figures = {"loss_by_tokens.png": loss_figure(groups), "perplexity.png": perplexity_figure(groups, reference)}
        return {name: png(figure) for name, figure in figures.items()}

    with many_imports():
        from relora_mora.config.load import ConfigError
        from relora_mora.experiments.compare.groups import group_of, group_runs
        from relora_mora.experiments.compare.runs import TABLE, CompareError, read_run, run_folders
        from relora_mora.experiments.compare.table import markdown, write_files

    if not runs:
        raise CompareError("no runs given; give run folders, e.g. runs/full runs/remora")
    missing = [f"{name}: not found; give the train.run_dir of a run" for name in runs if not Path(name).exists()]
    if missing:
        raise ConfigError(missing, "the command line")
    found = []
    faults = []
    for folder in itertools.chain.from_iterable(run_folders(Path(name)) for name in runs):
        try:
            found.append(read_run(folder))
        except CompareError as error:
            faults.append(str(error))
    if not found:
        raise ConfigError(faults, "the command line")
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    by_folder = {each.folder.resolve(): each for each in found}
    settings = [[name.strip() for name in option.split(",") if name.strip()] for option in (unnamed, best)]
    groups = group_runs(by_folder.values(), *settings)
    reference = groups[0] if against is None else group_of(groups, against)
    table = markdown(groups, reference)
    print(table, end="", flush=True)
    if out is not None:
        write_files(Path(out), TABLE, table, draw)
