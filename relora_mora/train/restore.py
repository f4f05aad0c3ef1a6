"""Puts a run where a checkpoint stands."""

from __future__ import annotations

import shutil
from pathlib import Path

from relora_mora.checkpoint import CheckpointError, CheckpointReader, list_checkpoints
from relora_mora.checkpoint.places import list_new, step_of
from relora_mora.distributed import same_on_all_ranks
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.build import Run
from relora_mora.train.state import RunState


def restore(run: Run, reader: CheckpointReader) -> RunState:
    """Tensors, operators and state of a checkpoint, and the merge that a shorter run left to its export; a collective.

    Raises :class:`CheckpointError` where its merges and the settings disagree.
    """
    checkpoints = RunFolder(Path(run.config.train.run_dir)).checkpoints
    manifest = reader.manifest
    state = RunState.load(manifest, own=is_own(run, reader))
    if state.trouble is None:  # else the run goes back to an earlier checkpoint
        check_merges(run, reader)
    reader.restore(run.engine, run.base)
    run.merger.set_operator(manifest.operator, manifest.draw)
    if run.engine.rank == 0:
        _abandon_later(checkpoints, manifest.step)
    if state.trouble is None and run.schedule.merges_done(state.step) > manifest.merges_done:
        run.merger.merge(state.step, run.schedule.merges_done(state.step), run.schedule.operator(state.step))
        log.info("step %d: merged, which the shorter run had left to its export", state.step)
    return state


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


def check_merges(run: Run, reader: CheckpointReader) -> None:
    """Raises :class:`CheckpointError` where a checkpoint has merged otherwise than the settings say.

    The last step of a run does not merge; a longer run makes up for it when it begins there.
    """
    manifest = reader.manifest
    due = run.schedule.merges_done(manifest.step)
    operator = run.schedule.operator(manifest.step)
    left_out = due == manifest.merges_done + 1 and run.schedule.merge_after(manifest.step)
    fault = ""
    if due != manifest.merges_done and not left_out:
        fault = (
            f"has merged {manifest.merges_done} times, with these settings a run at step {manifest.step} has merged "
            f"{due} times; resume with the method.merge_every and method.merge_until_step it was made with"
        )
    elif operator != manifest.operator and not left_out:
        fault = (
            f"was made with operator {manifest.operator}, the settings say {operator} after step {manifest.step}; "
            "resume with the method.operators it was made with"
        )
    if fault:
        raise same_on_all_ranks(CheckpointError(f"{reader.folder}: {fault}"))
