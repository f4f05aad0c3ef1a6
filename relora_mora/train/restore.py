"""Puts a run where a checkpoint stands."""

from __future__ import annotations

import shutil
from pathlib import Path

from relora_mora.checkpoint import CheckpointReader, list_checkpoints
from relora_mora.checkpoint.places import list_new, step_of
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.build import Run
from relora_mora.train.state import RunState


def restore(run: Run, reader: CheckpointReader) -> RunState:
    """Tensors, operators and state of a checkpoint; a collective."""
    checkpoints = RunFolder(Path(run.config.train.run_dir)).checkpoints
    manifest = reader.manifest
    reader.restore(run.engine, run.base)
    run.merger.set_operator(manifest.operator, manifest.draw)
    if run.engine.rank == 0:
        _abandon_later(checkpoints, manifest.step)
    return RunState.load(manifest, own=is_own(run, reader))


def is_own(run: Run, reader: CheckpointReader) -> bool:
    """Whether a checkpoint is one of this run's folder, and not of another run that this one begins from."""
    return reader.folder.parent.resolve() == RunFolder(Path(run.config.train.run_dir)).checkpoints.resolve()


def _abandon_later(checkpoints: Path, step: int) -> None:
    """After going back, checkpoints of later steps belong to another history: the next resume must not take them."""
    for later in [*list_checkpoints(checkpoints), *list_new(checkpoints)]:
        if (step_of(later.with_suffix("")) or 0) > step:
            target = later.with_name(f"abandoned-{later.with_suffix('').name}")
            shutil.rmtree(target, ignore_errors=True)
            later.rename(target)
            log.warning("%s is later than the step resumed from: renamed to %s", later.name, target.name)
