"""The checkpoint that a user names."""

from __future__ import annotations

import contextlib
from pathlib import Path

from relora_mora.checkpoint import CheckpointError, Manifest, newest_whole, read_manifest, verify
from relora_mora.checkpoint.reader import list_candidates
from relora_mora.system.logs import shared_log
from relora_mora.system.run_folder import RunFolder


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``, or the newest whole one where that is a run folder or its ``checkpoints/``.

    A warning names newer ones that are damaged. Raises :class:`CheckpointError` when there is none or when it is
    damaged.
    """
    for folder in (path, RunFolder(path).checkpoints):
        while candidates := list_candidates(folder):
            found, skipped = newest_whole(folder)
            if found is not None:
                for reason in skipped:
                    shared_log.warning("%s: passed over %s", folder, reason)
                return found
            if list_candidates(folder) == candidates:  # else its run has removed them, and has newer ones
                raise CheckpointError(f"{folder}: no checkpoint in it is whole: {'; '.join(skipped)}")
    if not path.is_dir():
        what = "is no folder" if path.exists() else "not found"
        raise CheckpointError(
            f"{path}: {what}; give a run folder, or a checkpoint such as RUN/checkpoints/step-00001000"
        )
    problem = verify(path)
    if problem is not None:
        raise CheckpointError(
            problem if problem.startswith(str(path)) else f"{path}: {problem}; use an older checkpoint"
        )
    return path


def newest_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``, or the newest that can be read where that is a run folder or its
    ``checkpoints/``. Whether the checkpoint's files are whole is not looked at.

    Raises :class:`CheckpointError` when there is none.
    """
    for folder in (path, RunFolder(path).checkpoints):
        for checkpoint in list_candidates(folder):
            with contextlib.suppress(CheckpointError):
                return read_manifest(checkpoint)
    return read_manifest(path)
