"""Measures the rank of the weight updates of runs."""

from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from relora_mora.system.bars import Bar
from relora_mora.system.process import many_imports


def main(*runs: str, out: str | None = None, above: Annotated[float, Ge(0)] = 0.1) -> None:
    """Prints the effective rank of what training added to the weights.

    For each projection, it prints the effective rank of W - W_0 and the number of its large singular values.
    W is the weight in each run's newest checkpoint, including adapters and merges; W_0 is the run's initial weight.
    Numbers are means over layers, and over runs that differ only in the seed.

    Arguments:
        runs: run folders

    Options:
        out: a folder for spectrum.md and, if matplotlib is installed, spectrum.png; it is created if needed, and these
            files in it are replaced
        above: singular values above this count as large

    Example:
        relora-mora spectrum runs/tiny_lora runs/tiny_remora --out=spectra
    """

    def draw() -> dict[str, bytes]:
        from relora_mora.experiments.compare.figures import png, spectrum_figure

        means = [{kind: values.double().mean(0).tolist() for kind, values in of_group.items()} for of_group in spectra]
        return {"spectrum.png": png(spectrum_figure(groups, means))}

    with many_imports():
        from relora_mora.checkpoint.reader import CheckpointReader, find_checkpoint
        from relora_mora.experiments.compare.groups import group_runs
        from relora_mora.experiments.compare.runs import CompareError, read_run
        from relora_mora.experiments.compare.table import table_of, write_files
        from relora_mora.experiments.spectrum import joined, rank_columns, spectra_of

    if not runs:
        raise CompareError("no runs given; give run folders, e.g. runs/lora runs/remora")
    groups = group_runs({Path(name).resolve(): read_run(Path(name)) for name in runs}.values())
    # open files stay readable if a run that continues removes its checkpoint
    readers = [[CheckpointReader(find_checkpoint(each.folder)) for each in group.runs] for group in groups]
    steps = [sorted({reader.manifest.step for reader in group_readers}) for group_readers in readers]
    with Bar("singular values"):
        spectra = [joined([spectra_of(reader) for reader in group_readers]) for group_readers in readers]
    columns = {"method": [group.method for group in groups], "settings": [group.differs for group in groups]}
    columns |= {"seeds": [str(len(group.runs)) for group in groups], "step": [", ".join(map(str, s)) for s in steps]}
    notes = [f"Effective rank of W - W_0; singular values above {above:g}. Means over layers and seeds."]
    notes += [f"{group.label}: {group.state}." for group in groups if group.state]
    table = table_of(columns | rank_columns(spectra, above), left=2) + "".join(f"\n{note}\n" for note in notes)
    print(table, end="", flush=True)
    if out is not None:
        write_files(Path(out), "spectrum.md", table, draw)
