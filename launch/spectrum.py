"""The rank of what runs have added to their weights: ``python launch/spectrum.py runs/lora runs/remora``."""

from __future__ import annotations

from pathlib import Path

try:
    from relora_mora.cli.command import run
    from relora_mora.system.process import many_imports
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None


def main(*runs: str, out: str | None = None, above: float = 0.1, checkpoints: bool = False) -> None:
    """Prints, for each kind of projection, the effective rank of W - W_0 and how many of its singular values are large.

    W is that of each run's newest checkpoint, adapters and merges included, and W_0 what the run began with. Numbers
    are means over layers, and over runs that share all settings but the seed.

    Args:
        runs: run folders
        out: a folder for spectrum.md and spectrum.png; it is made, and what it has of these is replaced
        above: what a large singular value is above
        checkpoints: draws the effective rank at every checkpoint that the runs have kept, too (effective_rank.png)
    """
    from relora_mora.experiments.compare.files import check_plots, write_files
    from relora_mora.experiments.compare.groups import group_runs
    from relora_mora.experiments.compare.runs import CompareError, read_run
    from relora_mora.experiments.compare.table import table_of

    if not runs:
        raise CompareError("no run given; give run folders, e.g. runs/lora runs/remora")
    if not above >= 0:
        raise CompareError(f"--above: got {above}, and singular values are not negative; give a number from 0 on")
    if out is not None:
        check_plots(Path(out))
    elif checkpoints:
        raise CompareError("--checkpoints: draws a figure; give --out, a folder for it")
    groups = group_runs({Path(name).resolve(): read_run(Path(name)) for name in runs}.values())
    with many_imports():
        from relora_mora.checkpoint.reader import CheckpointReader, find_checkpoint
        from relora_mora.experiments.compare.spectra import accumulated_figure, rank_columns, spectrum_figure
        from relora_mora.experiments.spectrum import spectra_of
    # opened, they stay readable when a run that goes on removes them
    readers = [[CheckpointReader(find_checkpoint(each.folder)) for each in group.runs] for group in groups]
    steps = [sorted({reader.manifest.step for reader in of_group}) for of_group in readers]
    for group, of_group in zip(groups, steps, strict=True):
        if len(of_group) > 1:
            raise CompareError(
                f"{group.label}: the newest checkpoints of its seeds are of steps {', '.join(map(str, of_group))}; "
                "give the runs that have come equally far"
            )
    spectra = [[spectra_of(reader) for reader in of_group] for of_group in readers]
    columns = {"method": [group.method for group in groups], "settings": [group.differs for group in groups]}
    columns |= {"seeds": [str(len(group.runs)) for group in groups], "step": [str(step) for [step] in steps]}
    notes = [f"Effective rank of W - W_0; singular values above {above:g}. Means over layers and seeds."]
    notes += [f"{group.label}: {group.state}." for group in groups if group.state]
    table = table_of(columns | rank_columns(spectra, above), left=2) + "".join(f"\n{note}\n" for note in notes)
    print(table, end="", flush=True)
    if out is None:
        return
    figures = {"spectrum": spectrum_figure(groups, spectra)}
    if checkpoints and (ranks := accumulated_figure(groups)) is not None:
        figures["effective_rank"] = ranks
    write_files(Path(out), {"spectrum.md": table}, figures)


if __name__ == "__main__":
    run(main)
