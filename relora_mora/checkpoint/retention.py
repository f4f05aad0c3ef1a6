"""Which checkpoints stay, and what is left to clean up after a run that was killed."""

from __future__ import annotations

from pathlib import Path

from relora_mora.checkpoint.layout import MANIFEST, CheckpointError, read_manifest
from relora_mora.checkpoint.places import TEMPORARY, discard, list_checkpoints, list_new, put_in_place, step_of
from relora_mora.checkpoint.reader import verify
from relora_mora.system.files import remove


def retire(folder: Path, newest: int, *, keep_last: int, keep_every_steps: int) -> None:
    """Removes the checkpoints below ``checkpoints/`` up to step ``newest`` that need not be kept.

    Kept are the ``keep_last`` newest, those whose step is a multiple of ``keep_every_steps``, and the newest one that
    a run can go back to. Checkpoints of later steps belong to another history and are left alone.
    """
    whole: list[tuple[int, Path]] = []  # newest first
    for path in list_checkpoints(folder):
        step = step_of(path)
        if step is not None and step <= newest and (path / MANIFEST).exists():
            whole.append((step, path))
    kept = {path for step, path in whole if keep_every_steps and step % keep_every_steps == 0}
    kept |= {path for _, path in whole[:keep_last]}
    good = next((path for _, path in whole if _is_good(path)), None)
    for _, path in whole:
        if path not in kept and path != good:
            discard(path)


def _is_good(checkpoint: Path) -> bool:
    try:
        return read_manifest(checkpoint).is_good
    except CheckpointError:
        return False


def tidy(folder: Path) -> None:
    """Finishes or removes what a killed run left half done below ``checkpoints/``."""
    for new in list_new(folder):
        if verify(new) is None or not new.with_suffix("").exists():
            put_in_place(new)
        else:
            remove(new)
    for path in folder.glob(f"*{TEMPORARY}"):
        remove(path)
