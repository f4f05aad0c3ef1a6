"""Restores a run from a checkpoint, and sets aside what belongs to another history of its folder."""

import itertools
import os
from pathlib import Path

from relora_mora.checkpoint.layout import LATEST, NEW, CheckpointError, list_checkpoints, list_new, step_folder, step_of
from relora_mora.checkpoint.reader import CheckpointReader
from relora_mora.distributed.collectives import same_on_all_ranks
from relora_mora.system.files import write_if_possible, write_synced
from relora_mora.system.logs import counted, log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.build import Run
from relora_mora.train.state.run_state import RunState


def restore(run: Run, reader: CheckpointReader) -> RunState:
    """Loads tensors, operator and state of a checkpoint into a run, and makes a merge that is overdue; a collective.

    A run leaves out the merge after its last step, and its export includes it instead; a longer run has to make it.
    Raises :class:`CheckpointError`, before anything changes, if the merges of the checkpoint contradict the settings.
    """
    manifest = reader.manifest
    own = _is_own(run, reader)
    state = RunState.load(manifest, own=own)
    is_overdue = state.trouble is None and is_merge_overdue(run, reader)  # a run in trouble goes further back
    reader.restore(run.engine, run.base)
    run.merger.set_operator(manifest.operator, manifest.draw)
    if run.engine.rank == 0:
        _abandon_other_history(RunFolder(Path(run.config.train.run_dir)), reader, own=own)
    checked = run.checked
    if (manifest.data_fingerprint, manifest.data_content) != (checked.data_fingerprint, checked.data_content):
        state.health.begin_window()
    if is_overdue:
        merges_done = run.schedule.merges_done(state.step)
        state.overdue_merge = run.merger.merge(state.step, merges_done, run.schedule.operator(state.step))
        log.info("step %d: made the merge that was due here, which the shorter run had left to its export", state.step)
    return state


def _is_own(run: Run, reader: CheckpointReader) -> bool:
    """Whether a checkpoint belongs to the history of this run, and not to another one that this run begins from."""
    own = RunFolder(Path(run.config.train.run_dir)).checkpoints / step_folder(reader.manifest.step)
    return reader.folder.resolve() in (own.resolve(), own.with_name(own.name + NEW).resolve())


def is_merge_overdue(run: Run, reader: CheckpointReader) -> bool:
    """Whether the merge after a checkpoint's step is still to be made, because a shorter run ended there without it.

    Raises :class:`CheckpointError` if the merges or the operator of the checkpoint contradict the settings.
    """
    manifest = reader.manifest
    due = run.schedule.merges_done(manifest.step)
    operator = run.schedule.operator(manifest.step)
    if due == manifest.merges_done + 1 and run.schedule.merge_after(manifest.step):
        return True
    if due != manifest.merges_done:
        fault = (
            f"has made {counted(manifest.merges_done, 'merge')}, with these settings a run at step {manifest.step} has "
            f"made {due}; resume with the method.name, method.merge_every, method.merge_until_step and train.steps it "
            "was made with"
        )
    elif operator != manifest.operator:
        fault = (
            f"was made with operator {manifest.operator}, the settings say {operator} after step {manifest.step}; "
            "resume with the method.operators it was made with"
        )
    else:
        return False
    raise same_on_all_ranks(CheckpointError(f"{reader.folder}: {fault}"))


def _abandon_other_history(folder: RunFolder, reader: CheckpointReader, *, own: bool) -> None:
    """Leaves only the history of the restored checkpoint in the run folder. First rank only.

    Later checkpoints are renamed. If the checkpoint is not ``own``, so are all checkpoints and the records of the run
    that was in the folder.
    """
    step = reader.manifest.step
    latest = folder.checkpoints / LATEST
    abandoned = _abandon_checkpoints(folder, after=step if own else -1)
    if own:
        if abandoned:
            write_if_possible(latest, f"{step_folder(step)}\n", without="it names another one; training goes on")
        return
    latest.unlink(missing_ok=True)
    _abandon_records(folder)
    starts = reader.folder / folder.starts.name
    if reader.folder.parent.resolve() == folder.checkpoints.resolve() and starts.is_file():
        # the run returns to a checkpoint that it had abandoned, and to the starts that led to it
        write_synced(folder.starts, starts.read_text(encoding="utf-8"))


def _abandon_checkpoints(folder: RunFolder, *, after: int) -> bool:
    """Renames the checkpoints of later steps, so that the next resume does not take them.

    Each gets a copy of ``starts.jsonl``, which says how it was made. Returns whether there were any.
    """
    checkpoints = [*list_checkpoints(folder.checkpoints), *list_new(folder.checkpoints)]
    later = [path for path in checkpoints if (step_of(path.with_suffix("")) or 0) > after]
    starts = folder.starts.read_text(encoding="utf-8", errors="replace") if folder.starts.exists() else ""
    for path in later:
        write_if_possible(
            path / folder.starts.name, starts, without="a run that goes back there will not know what it began with"
        )
        _abandon(path, path.with_suffix("").name)
    return bool(later)


def start_records(folder: RunFolder) -> None:
    """Called when a run starts at step 0: renames the records of an earlier run that has made at least one step."""
    files = [path for path in (folder.metrics, folder.starts) if path.exists()]
    lines = [line for path in files for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any('"step": 0,' not in line for line in lines):
        _abandon_records(folder)


def _abandon_records(folder: RunFolder) -> None:
    """Renames the metrics, starts and task scores of the run that was in the folder before."""
    for path in (folder.metrics, folder.starts, folder.tasks):
        if path.exists():
            _abandon(path, path.name)


def _abandon(path: Path, name: str) -> None:
    names = itertools.chain([name], (f"{number}-{name}" for number in itertools.count(2)))
    targets = (path.with_name(f"abandoned-{each}") for each in names)
    target = next(each for each in targets if not os.path.lexists(each))
    path.rename(target)
    log.warning("%s does not belong to the history that continues here: renamed to %s", path.name, target.name)
