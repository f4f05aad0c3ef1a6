"""Decides whether and where a run resumes, and whether its settings allow it."""

import contextlib
from pathlib import Path

from relora_mora.checkpoint.layout import CheckpointError, list_checkpoints
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
from relora_mora.train.begin.check import ResolvedRun
from relora_mora.train.begin.identity import Identity, changes_since
from relora_mora.train.log.report import logged
from relora_mora.train.state.restore import kept_best, restore
from relora_mora.train.state.run_state import Best, RunState
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


def open_checkpoint(checked: ResolvedRun, begin: Path, rank: int, world_size: int) -> CheckpointReader:
    """The newest checkpoint of a run, or the one at ``begin``; a collective.

    Raises :class:`CheckpointError` if no checkpoint is complete, or if a setting differs that must not change.
    """
    config = checked.config
    if begin == RunFolder(Path(config.train.run_dir)).checkpoints:
        chosen = _newest(begin, rank, world_size)
    else:
        chosen = from_first_rank(lambda: find_checkpoint(begin))
    reader = CheckpointReader(chosen)
    _check_same_run(checked, reader)
    if rank == 0:
        for name, began in other_weights(chosen, config.model).items():
            log.warning("%s: the run began with %s; it continues from %s and ignores them", name, began, chosen)
    return reader


def resume(run: Run, reader: CheckpointReader) -> RunState:
    """Restores a run from a checkpoint; a collective."""
    state = restore(run, reader)
    folder = RunFolder(Path(run.config.train.run_dir))
    # the evaluation of a checkpoint's step may come after it, if a signal interrupted it
    line = from_first_rank(lambda: logged(folder, state.step, "eval/seconds")) if state.saved is not None else None
    if line is not None:
        state.evaluated = state.step
        state.best = kept_best(run.config, Best(**line["checkpoint/best"]) if "checkpoint/best" in line else None)
    if reader.manifest.data_order != run.checked.data_order:
        state.data = start_states(run.config.lanes, mixture_names(run.config.data))
        shared_log.warning("the training data has changed (train.allow_changes): it is read from its beginning")
    elif reader.manifest.data_content != run.checked.data_content:
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


def _check_same_run(checked: ResolvedRun, reader: CheckpointReader) -> None:
    """Raises :class:`CheckpointError` with every difference that would change the result and is not allowed."""
    manifest = reader.manifest
    config = checked.config.train
    changes = list(changes_since(Identity.of(manifest), checked.identity, set(config.allow_changes)))
    permissions = sorted({change.permission for change in changes if change.permission is not None})
    faults = []
    for change in changes:
        with_flag = change.permission is not None and len(permissions) == 1
        faults.append(f"{change.text}; {_permission(permissions)}" if with_flag else change.text)
    if manifest.step > 0 and not manifest.data_state:
        faults.append("data: the checkpoint does not hold its position in the data")
    if manifest.step > config.steps:
        faults.append(f"train.steps: the checkpoint is already at step {manifest.step}")
    if not faults:
        return
    lines = [f"{reader.folder}: made with other settings:", *(f"  - {fault}" for fault in faults)]
    if len(permissions) > 1:
        lines.append(_permission(permissions))
    raise same_on_all_ranks(CheckpointError("\n".join(lines)))


def _permission(names: list[str]) -> str:
    """The flag that allows these changes, quoted for the shell."""
    return f"to allow {'it' if len(names) == 1 else 'these changes'}: '--train.allow_changes=[{','.join(names)}]'"
