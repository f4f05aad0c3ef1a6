"""Puts a run where a checkpoint stands."""

from __future__ import annotations

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
    """Tensors, operators and state of a checkpoint, and the merge that a shorter run left to its export; a collective.

    Raises :class:`CheckpointError` where its merges and the settings disagree.
    """
    folder = RunFolder(Path(run.config.train.run_dir))
    manifest = reader.manifest
    own = is_own(run, reader)
    state = RunState.load(manifest, own=own)
    owes_merge = state.trouble is None and lacks_merge(run, reader)  # in trouble the run goes further back
    reader.restore(run.engine, run.base)
    run.merger.set_operator(manifest.operator, manifest.draw)
    if run.engine.rank == 0:
        latest = folder.checkpoints / LATEST
        abandoned = _abandon_checkpoints(folder, after=manifest.step if own else -1)
        if not own:
            latest.unlink(missing_ok=True)
            abandon_records(folder)
            _take_back_starts(folder, reader.folder)
        elif abandoned:
            write_if_possible(
                latest, f"{step_folder(manifest.step)}\n", without="it names another one; training goes on"
            )
    text = (run.checked.data_fingerprint, run.checked.data_content)
    if (manifest.data_fingerprint, manifest.data_content) != text:
        state.health.begin_window()
    if owes_merge:
        done = run.schedule.merges_done(state.step)
        state.made_up = run.merger.merge(state.step, done, run.schedule.operator(state.step))
        log.info("step %d: merged, which was due here: the run had left it to its export", state.step)
    return state


def is_own(run: Run, reader: CheckpointReader) -> bool:
    """Whether a checkpoint is one of this run's history, and not of another that this one begins from."""
    named = RunFolder(Path(run.config.train.run_dir)).checkpoints / step_folder(reader.manifest.step)
    return reader.folder.resolve() in (named.resolve(), named.with_name(named.name + NEW).resolve())


def _abandon_checkpoints(folder: RunFolder, *, after: int) -> bool:
    """Renames checkpoints of later steps: they belong to another history, and the next resume must not take them.

    Each gets a copy of ``starts.jsonl``, which says how it was made. Returns whether there were any.
    """
    found = [*list_checkpoints(folder.checkpoints), *list_new(folder.checkpoints)]
    later = [each for each in found if (step_of(each.with_suffix("")) or 0) > after]
    starts = folder.starts.read_text(encoding="utf-8", errors="replace") if folder.starts.exists() else ""
    for other in later:
        write_if_possible(
            other / folder.starts.name, starts, without="a run that goes back there will not know what it began with"
        )
        _abandon(other, other.with_suffix("").name)
    return bool(later)


def abandon_records(folder: RunFolder) -> None:
    """Likewise the metrics, starts and scores on tasks of a run that was in the folder before."""
    for path in (folder.metrics, folder.starts, folder.tasks):
        if path.exists():
            _abandon(path, path.name)


def _take_back_starts(folder: RunFolder, checkpoint: Path) -> None:
    """Where a run goes back to a checkpoint that it abandoned: the starts that had made it."""
    kept = checkpoint / folder.starts.name
    if checkpoint.parent.resolve() == folder.checkpoints.resolve() and kept.is_file():
        write_synced(folder.starts, kept.read_text(encoding="utf-8"))


def begin_records(folder: RunFolder) -> None:
    """Where a run begins anew: puts those of an earlier one aside, but for what came before its first step."""
    files = [path for path in (folder.metrics, folder.starts) if path.exists()]
    lines = [line for path in files for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any('"step": 0,' not in line for line in lines):
        abandon_records(folder)


def _abandon(path: Path, name: str) -> None:
    names = itertools.chain([name], (f"{number}-{name}" for number in itertools.count(2)))
    target = next(each for each in (path.with_name(f"abandoned-{name}") for name in names) if not os.path.lexists(each))
    path.rename(target)
    log.warning("%s is not of the history that goes on here: renamed to %s", path.name, target.name)


def lacks_merge(run: Run, reader: CheckpointReader) -> bool:
    """Whether the merge of a checkpoint's step is still to be made: a shorter run ended there, and left it out.

    Raises :class:`CheckpointError` where it has merged otherwise than the settings say.
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
