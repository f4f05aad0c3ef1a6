"""Writes a comparison to a folder."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from relora_mora.experiments.compare.groups import Group
from relora_mora.experiments.compare.runs import TABLE, CompareError
from relora_mora.system.bars import Bar
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


def write_comparison(folder: Path, table: str, groups: Sequence[Group], against: Group | None = None) -> None:
    """Writes a table and, if matplotlib is installed, the figures of its groups."""
    files: dict[str, str | bytes] = {TABLE: table}
    if can_draw():
        from relora_mora.experiments.compare.figures import figures_of

        with Bar("drawing figures"):
            files |= figures_of(groups, against)
    write_files(folder, files)


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes files by name; replaces each existing file atomically."""
    with disk_faults_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_synced(folder / name, content)
