"""What a comparison leaves in a folder: tables as text, and figures as PNG."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from relora_mora.experiments.compare.figures import PAPER, REACH
from relora_mora.experiments.compare.runs import CompareError
from relora_mora.system.files import disk_faults_named, write_synced

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plots(folder: Path) -> None:
    """Raises :class:`CompareError` where matplotlib is not installed, or there is a file in place of the folder."""
    if folder.exists() and not folder.is_dir():
        raise CompareError(f"--out: {folder} is a file, and a folder is needed; give another one")
    if importlib.util.find_spec("matplotlib") is None:
        raise CompareError(
            "--out: plots need matplotlib, which is not installed: pip install matplotlib, or pip install -e '.[plot]' "
            "in the checkout; without --out the table alone is printed"
        )


def write_files(folder: Path, texts: Mapping[str, str], figures: Mapping[str, Figure]) -> None:
    """Texts by the names of their files, figures by those without ``.png``; what is there of these is replaced, each
    file whole or not at all.

    Older figures of what not every comparison has, ranks and ``--reach``, do not stay beside them.
    """
    with disk_faults_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_synced(folder / name, text)
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
        for older in (folder / "effective_rank.png", *folder.glob(f"{REACH}*.png")):
            if older.stem not in figures:
                older.unlink(missing_ok=True)


def save(figure: Figure, path: Path) -> None:
    """As PNG, whole or not at all."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    beside = path.with_name(f"{path.name}.tmp")
    try:
        with matplotlib.rc_context(PAPER):
            FigureCanvasAgg(figure)
            figure.savefig(beside, format="png", bbox_inches="tight", pad_inches=0.05)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
