"""Decides whether and where a run resumes, and whether its settings allow it."""

import contextlib
from pathlib import Path

from relora_mora.checkpoint.layout import CheckpointError, list_checkpoints, read_manifest
from relora_mora.checkpoint.reader import (
    CheckpointReader,
    at_best,
    check_folder,
    find_checkpoint,
    newest_manifest,
    newest_whole,
)
from relora_mora.config.schema import Config
from relora_mora.data.lanes import start_states
from relora_mora.data.stream.producer import mixture_names
from relora_mora.distributed.collectives import from_first_rank, same_on_all_ranks
from relora_mora.system.logs import log, shared_log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.build import Run
from relora_mora.train.begin.identity import Identity, changes_since
from relora_mora.train.begin.inputs import Inputs
from relora_mora.train.begin.run_folder import start_records
from relora_mora.train.state.restore import restore
from relora_mora.train.state.run_state import RunState
from relora_mora.weights.digests import other_weights


def where_to_resume(config: Config) -> Path | None:
    """The checkpoint or run folder that this start resumes from; None if the run starts at step 0.

    To resume from its newest checkpoint, a run gets its own folder of checkpoints.

    A checkpoint named in ``train.resume`` is where a run begins, or one of its own that it goes back to. It is used
    once: a second start that names it continues from what the first one saved. Raises :class:`CheckpointError` if it is
    ambiguous where the run should resume.
    """
    resume = config.train.resume
    folder = RunFolder(Path(config.train.run_dir))
    own = folder.checkpoints
    named = at_best(Path(resume))
    if not list_checkpoints(own):
        if resume not in ("auto", "never"):
            check_folder(named)
            return named
        if resume == "auto" and (abandoned := sorted(own.glob("abandoned-*step-*"))):
            raise CheckpointError(
                f"{own}: holds {abandoned[-1].name} and no other checkpoint; name one in train.resume, or move it away "
                "to start again"
            )
        return None
    if resume == "never":
        raise CheckpointError(
            f"{own}: holds checkpoints, and train.resume=never; use another train.run_dir, or train.resume=auto"
        )
    if resume == "auto" or own.resolve() in (named.resolve(), RunFolder(named).checkpoints.resolve()):
        return own
    previous = None
    with contextlib.suppress(CheckpointError):
        previous = newest_manifest(own).config.get("train", {}).get("resume")
    if previous == resume:
        log.warning(
            "train.resume=%s: the run began there before, and continues from what it saved; to begin there again, give "
            "another train.run_dir",
            resume,
        )
        return own
    check_folder(named)
    if own.resolve() not in (named.absolute().parent.resolve(), named.resolve().parent):
        raise CheckpointError(
            f"train.resume={resume}: {folder.path} holds checkpoints of a start that did not begin there; "
            "train.resume=auto continues from them; to begin at the one you named, give another train.run_dir"
        )
    return named


def checkpoint_at(where: Path, inputs: Inputs, rank: int) -> Path:
    """The newest checkpoint of a run, or the one at a path; a collective.

    Raises :class:`CheckpointError` if no checkpoint is complete, or if a setting differs that must not change.
    """
    config = inputs.config
    if where == RunFolder(Path(config.train.run_dir)).checkpoints:
        chosen = _newest(where, rank, inputs.world_size)
    else:
        chosen = from_first_rank(lambda: find_checkpoint(where))
    from_first_rank(lambda: _check_same_run(inputs, chosen))
    return chosen


def begin(run: Run) -> RunState:
    """The state of a run at step 0. Its parts are built with their initial values; a collective."""
    from_first_rank(lambda: start_records(RunFolder(Path(run.config.train.run_dir))))
    return RunState(initial_seed=run.config.train.seed)


def resume(run: Run, checkpoint: Path) -> RunState:
    """Restores a run from a checkpoint; a collective."""
    reader = CheckpointReader(checkpoint)
    state = restore(run, reader)
    log.info("resumed from %s at step %d", checkpoint, state.step)
    if reader.manifest.data_order != run.inputs.data_order:
        state.data = start_states(run.config.lanes, mixture_names(run.config.data))
        shared_log.warning("the training data has changed (train.allow_changes): it is read from its beginning")
    elif reader.manifest.data_content != run.inputs.data_content:
        shared_log.warning(
            "the training data has other content under the same names (train.allow_changes): "
            "reading continues at the same lines"
        )
    return state


def _newest(folder: Path, rank: int, world_size: int) -> Path:
    chosen, skipped = newest_whole(folder, (rank, world_size))
    for reason in skipped if rank == 0 else ():  # the same on all ranks
        log.warning("passed over %s", reason)
    if chosen is None:
        fault = f"{folder}: all checkpoints in it are damaged; move them away to start again"
        raise same_on_all_ranks(CheckpointError(fault))
    return chosen


def _check_same_run(inputs: Inputs, checkpoint: Path) -> None:
    """Raises :class:`CheckpointError` with every difference that would change the result and is not allowed."""
    manifest = read_manifest(checkpoint)
    config = inputs.config
    allowed = set(config.train.allow_changes)
    changes = [
        change for change in changes_since(Identity.of(manifest), inputs.identity) if not change.is_allowed(allowed)
    ]
    permissions = sorted({change.permission for change in changes if change.permission is not None})
    faults = []
    for change in changes:
        with_flag = change.permission is not None and len(permissions) == 1
        faults.append(f"{change.text}; {_permission(permissions)}" if with_flag else change.text)
    if manifest.step > 0 and not manifest.data_state:
        faults.append("data: the checkpoint does not hold its position in the data")
    if manifest.step > config.train.steps:
        faults.append(f"train.steps: the checkpoint is already at step {manifest.step}")
    if faults:
        lines = [f"{checkpoint}: made with other settings:", *(f"  - {fault}" for fault in faults)]
        if len(permissions) > 1:
            lines.append(_permission(permissions))
        raise CheckpointError("\n".join(lines))
    for name, began in other_weights(checkpoint, config.model).items():
        log.warning("%s: the run began with %s; it continues from %s and ignores them", name, began, checkpoint)


def _permission(names: list[str]) -> str:
    """The flag that allows these changes, quoted for the shell."""
    return f"to allow {'it' if len(names) == 1 else 'these changes'}: '--train.allow_changes=[{','.join(names)}]'"
