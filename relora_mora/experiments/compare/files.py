"""Writes a comparison to a folder."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from relora_mora.experiments.compare.runs import CompareError
from relora_mora.system.files import disk_faults_named, write_synced


def check_folder(folder: Path) -> None:
    """Raises :class:`CompareError` if ``folder`` is a file."""
    if folder.exists() and not folder.is_dir():
        raise CompareError(f"--out: {folder} is a file, expected a folder; give another path")


def can_draw() -> bool:
    """Whether matplotlib is installed; otherwise says how to get it."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    sys.stderr.write("only the table is written: figures need matplotlib; pip install 'relora_mora[plot]'\n")
    return False


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes files by name; replaces each existing file atomically."""
    with disk_faults_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_synced(folder / name, content)
