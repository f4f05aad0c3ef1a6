"""Names of checkpoint folders, and renames during which a kill at any point loses no checkpoint.

``step-N`` is the checkpoint of step N. A folder ``*.tmp`` is being written or removed and does not count. A folder
``*.new`` is whole and about to take the place of ``step-N``; it counts, in case a kill came in between.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from relora_mora.system.files import remove, sync

NEW = ".new"
TEMPORARY = ".tmp"


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint folder, None for other names."""
    match = re.fullmatch(r"step-([0-9]{8,15})", folder.name)
    return int(match[1]) if match and folder.name == step_folder(int(match[1])) else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders below ``checkpoints/`` that are named like checkpoints, whole or not, newest first."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if path.is_dir() and (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def list_new(folder: Path) -> list[Path]:
    """Whole checkpoints that were about to take the place of the folder of their step, newest first."""
    return sorted(
        (path for path in folder.glob(f"step-*{NEW}") if path.is_dir() and step_of(path.with_suffix("")) is not None),
        reverse=True,
    )


def put_in_place(new: Path) -> None:
    """Renames a whole checkpoint ``step-N.new`` to ``step-N``; what had that name is removed only after that."""
    final = new.with_suffix("")
    aside = _set_aside(final)
    new.rename(final)
    sync(final.parent)
    remove(aside)


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint. However this is cut short, nothing that is left looks like one."""
    remove(_set_aside(checkpoint))


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.old{TEMPORARY}")
    remove(aside)
    if os.path.lexists(path):
        path.rename(aside)
    return aside
