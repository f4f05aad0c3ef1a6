"""Writes a comparison to a folder."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from relora_mora.experiments.compare.runs import CompareError
from relora_mora.system.files import disk_faults_named, write_synced


def check_plots(folder: Path, otherwise: str = "; without --out only the table is printed") -> None:
    """Raises :class:`CompareError` if matplotlib is not installed, or if ``folder`` is a file."""
    if folder.exists() and not folder.is_dir():
        raise CompareError(f"--out: {folder} is a file, expected a folder; give another path")
    if importlib.util.find_spec("matplotlib") is None:
        raise CompareError(
            "--out: plots need matplotlib, which is not installed: pip install matplotlib, or pip install -e '.[plot]' "
            f"in the checkout{otherwise}"
        )


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes files by name; replaces each existing file atomically."""
    with disk_faults_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_synced(folder / name, content)
