"""Writes a comparison to a folder: tables as text, and figures as PNG."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from relora_mora.experiments.compare.curves import PAPER
from relora_mora.experiments.compare.figures import RANKS
from relora_mora.experiments.compare.runs import TABLE, CompareError
from relora_mora.system.files import disk_faults_named, write_synced

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plots(folder: Path, otherwise: str = "; without --out only the table is printed") -> None:
    """Raises :class:`CompareError` if matplotlib is not installed, or if ``folder`` is a file."""
    if folder.exists() and not folder.is_dir():
        raise CompareError(f"--out: {folder} is a file, expected a folder; give another path")
    if importlib.util.find_spec("matplotlib") is None:
        raise CompareError(
            "--out: plots need matplotlib, which is not installed: pip install matplotlib, or pip install -e '.[plot]' "
            f"in the checkout{otherwise}"
        )


def write_comparison(folder: Path, texts: Mapping[str, str], figures: "Mapping[str, Figure]") -> None:
    """Like :func:`write_files`. Deletes the figure of ranks of the comparison before if this one has none."""
    had_one = (folder / TABLE).exists()
    write_files(folder, texts, figures)
    if had_one and RANKS not in figures:
        (folder / f"{RANKS}.png").unlink(missing_ok=True)


def write_files(folder: Path, texts: Mapping[str, str], figures: "Mapping[str, Figure]") -> None:
    """Writes texts by file name and figures by file name without ``.png``; replaces each existing file atomically."""
    with disk_faults_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_synced(folder / name, text)
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")


def save(figure: "Figure", path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with matplotlib.rc_context(PAPER):
            FigureCanvasAgg(figure)
            figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.05)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
