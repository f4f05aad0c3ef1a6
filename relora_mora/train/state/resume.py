"""Decides whether and where a run resumes, and whether its settings allow it."""

from pathlib import Path

from relora_mora.checkpoint.layout import CheckpointError, list_checkpoints
from relora_mora.checkpoint.reader import CheckpointReader, check_folder, find_checkpoint, newest_whole
from relora_mora.config.load import dump
from relora_mora.config.schema import Config
from relora_mora.config.yaml_text import parse_yaml
from relora_mora.data.lanes import start_states
from relora_mora.data.stream.producer import mixture_names
from relora_mora.distributed.collectives import from_first_rank, same_on_all_ranks
from relora_mora.system.logs import log, shared_log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.build import Run
from relora_mora.train.begin.check import ResolvedRun, saved_settings
from relora_mora.train.begin.identity import Change, Identity, changed_settings, changes_since
from relora_mora.train.log.report import was_logged
from relora_mora.train.state.restore import restore
from relora_mora.train.state.run_state import RunState
from relora_mora.weights.digests import other_weights


def check_resume(config: Config) -> None:
    """Raises :class:`CheckpointError` for a ``train.resume`` that is wrong whatever the other settings are."""
    resume = config.train.resume
    folder = RunFolder(Path(config.train.run_dir))
    has_checkpoints = bool(list_checkpoints(folder.checkpoints))
    if resume == "never" and has_checkpoints:
        raise CheckpointError(
            f"{folder.checkpoints}: holds checkpoints, and train.resume=never; use another train.run_dir, or "
            "train.resume=auto"
        )
    if resume not in ("auto", "never") and not has_checkpoints:
        check_folder(Path(resume))


def where_to_resume(config: Config) -> Path | None:
    """The checkpoint or run folder that this start resumes from; None if the run starts at step 0.

    To resume from its newest checkpoint, a run gets its own folder of checkpoints.

    A checkpoint named in ``train.resume`` is where a run begins, or one of its own that it goes back to. It is used
    once: a second start with the same settings continues from what the first one saved. Raises
    :class:`CheckpointError` if it is ambiguous where the run should resume.
    """
    resume = config.train.resume
    folder = RunFolder(Path(config.train.run_dir))
    has_checkpoints = bool(list_checkpoints(folder.checkpoints))
    own = folder.checkpoints.resolve()
    named = Path(resume).absolute()
    if has_checkpoints and own in (named.resolve(), RunFolder(named).checkpoints.resolve()):
        resume = "auto"  # the name is this run's own folder
    if resume not in ("auto", "never"):
        before = saved_settings(folder.path)
        is_own = own in (named.parent.resolve(), named.resolve().parent)
        if not has_checkpoints or (is_own and before.get("train", {}).get("resume") != resume):
            return Path(resume)
        if any(changed_settings(before, parse_yaml(dump(config)))):
            if not named.exists():
                return Path(resume)  # reading it reports that it does not exist
            raise CheckpointError(
                f"train.resume={resume}: {folder.path} holds checkpoints of a start with other settings; "
                "train.resume=auto continues from them; to begin at the one you named, give another train.run_dir"
            )
        log.warning(
            "train.resume=%s: the previous start, with the same settings, began there, and the run continues from what "
            "it saved; to begin there again, give another train.run_dir",
            resume,
        )
    if resume == "auto" and not has_checkpoints and (abandoned := sorted(folder.checkpoints.glob("abandoned-*step-*"))):
        raise CheckpointError(
            f"{folder.checkpoints}: holds {abandoned[-1].name} and no other checkpoint; name one in train.resume, "
            "or move it away to start again"
        )
    return folder.checkpoints if has_checkpoints else None


def is_own_history(config: Config, begin: Path) -> bool:
    """Whether a run that resumes at ``begin`` continues from its newest checkpoint."""
    return begin == RunFolder(Path(config.train.run_dir)).checkpoints


def open_checkpoint(checked: ResolvedRun, begin: Path, rank: int, world_size: int) -> CheckpointReader:
    """The newest checkpoint of a run, or the one at ``begin``; a collective.

    Raises :class:`CheckpointError` if no checkpoint is complete, or if a setting differs that must not change.
    """
    config = checked.config
    if is_own_history(config, begin):
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
    if state.saved is not None and from_first_rank(lambda: was_logged(folder, state.step, "eval/seconds")):
        state.evaluated = state.step
    if reader.manifest.data_order != run.checked.data_order:
        state.data = start_states(run.config.lanes, mixture_names(run.config.data))
        shared_log.warning("the training data has changed (train.allow_changes): it is read from its beginning")
    elif reader.manifest.data_content != run.checked.data_content:
        shared_log.warning(
            "the training data has other content under the same names (train.allow_changes): "
            "reading continues at the same lines"
        )
    return state


def describe_changes(checked: ResolvedRun, reader: CheckpointReader) -> list[str]:
    """Describes the changes since the checkpoint that affect the result, which ``train.allow_changes`` has allowed."""
    return [change.text for change in _changes(checked, reader, set())]


def _changes(checked: ResolvedRun, reader: CheckpointReader, allowed: set[str]) -> list[Change]:
    return list(changes_since(Identity.of(reader.manifest), checked.identity, allowed))


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
    changes = _changes(checked, reader, set(config.allow_changes))
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
