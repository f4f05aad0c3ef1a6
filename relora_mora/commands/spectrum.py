"""Measures the rank of the weight updates of runs."""

from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from relora_mora.system.bars import Bar
from relora_mora.system.process import many_imports


def main(*runs: str, out: str | None = None, above: Annotated[float, Ge(0)] = 0.1) -> None:
    """Prints the effective rank of what training added to the weights.

    For each projection, it prints the effective rank of W - W_0 and the number of its large singular values, as means
    over layers. W is the weight in the run's newest checkpoint, including adapters and merges; W_0 is the run's initial
    weight.

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

        means = [{kind: values.double().mean(0).tolist() for kind, values in of_run.items()} for of_run in spectra]
        return {"spectrum.png": png(spectrum_figure(names, means))}

    if not runs:
        raise ValueError("no runs given; give run folders, e.g. runs/lora runs/remora")
    with many_imports():
        from relora_mora.checkpoint.reader import CheckpointReader, find_checkpoint
        from relora_mora.experiments.compare.table import table_of, write_files
        from relora_mora.experiments.spectrum import rank_columns, spectra_of

    names = [*{Path(name).resolve(): name for name in runs}.values()]
    # open files stay readable if a run that continues removes its checkpoint
    readers = [CheckpointReader(find_checkpoint(Path(name))) for name in names]
    with Bar("singular values"):
        spectra = [spectra_of(reader) for reader in readers]
    columns = {"run": names, "step": [str(reader.manifest.step) for reader in readers]}
    note = f"Effective rank of W - W_0; singular values above {above:g}. Means over layers."
    table = table_of(columns | rank_columns(spectra, above), left=1) + f"\n{note}\n"
    print(table, end="", flush=True)
    if out is not None:
        write_files(Path(out), "spectrum.md", table, draw)
