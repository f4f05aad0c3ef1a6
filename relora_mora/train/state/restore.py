"""Restores a run from a checkpoint, at a resume or at a rollback.

What belongs to another history of the run folder is set aside. A rollback takes a run back to its last good checkpoint
and continues with other data. Each rollback is written to ``rollbacks.json`` in the run folder. A run that is killed
after the rollback and resumes from an earlier checkpoint then skips the same data.
"""

import itertools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relora_mora.checkpoint import layout
from relora_mora.checkpoint.reader import CheckpointReader, newest_whole
from relora_mora.checkpoint.writer import CheckpointWriter
from relora_mora.data.lanes import merge_states
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks, same_on_all_ranks
from relora_mora.system.files import write_if_possible, write_synced
from relora_mora.system.logs import counted, log, shared_log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.build import Run
from relora_mora.train.log.report import merge_metrics
from relora_mora.train.state.run_state import RunState, TrainingError


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
    run.merger.set_operator(manifest.operator)
    run.merger.merges_done = manifest.merges_done
    if run.engine.rank == 0:
        _abandon_other_history(RunFolder(Path(run.config.train.run_dir)), reader, own=own)
    checked = run.checked
    if (manifest.data_fingerprint, manifest.data_content) != (checked.data_fingerprint, checked.data_content):
        state.health.begin_window()
    if is_overdue:
        merges_done = run.schedule.merges_done(state.step)
        record = run.merger.merge(state.step, merges_done, run.schedule.operator(state.step))
        state.done_at_load = merge_metrics(record)
        log.info("step %d: made the merge that was due here, which the shorter run had left to its export", state.step)
    return state


def _is_own(run: Run, reader: CheckpointReader) -> bool:
    """Whether a checkpoint belongs to the history of this run, and not to another one that this run begins from."""
    own = RunFolder(Path(run.config.train.run_dir)).checkpoints / layout.step_folder(reader.manifest.step)
    return reader.folder.resolve() in (own.resolve(), own.with_name(own.name + layout.NEW).resolve())


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
    raise same_on_all_ranks(layout.CheckpointError(f"{reader.folder}: {fault}"))


def _abandon_other_history(folder: RunFolder, reader: CheckpointReader, *, own: bool) -> None:
    """Leaves only the history of the restored checkpoint in the run folder. First rank only.

    Later checkpoints are renamed. If the checkpoint is not ``own``, so are all checkpoints and the records of the run
    that was in the folder.
    """
    step = reader.manifest.step
    latest = folder.checkpoints / layout.LATEST
    abandoned = _abandon_checkpoints(folder, after=step if own else -1)
    if own:
        if abandoned:
            write_if_possible(latest, f"{layout.step_folder(step)}\n", without="it names another one; training goes on")
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
    checkpoints = [*layout.list_checkpoints(folder.checkpoints), *layout.list_new(folder.checkpoints)]
    later = [path for path in checkpoints if (layout.step_of(path.with_suffix("")) or 0) > after]
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


@dataclass(frozen=True)
class Rollback:
    """The run went back from step ``at`` to the checkpoint of ``step``, and continued with the data after ``at``."""

    number: int  # from 1; numbers may be missing if the disk was full
    step: int
    at: int
    reason: str
    data_state: dict[str, Any]  # of all lanes
    data_order: str  # fingerprint of the data order that data_state refers to


def find_rollback_target(run: Run, step: int, writer: CheckpointWriter) -> Path | None:
    """The newest good checkpoint before a step. A collective; waits for a checkpoint that is being written."""
    writer.wait()
    gather_from_ranks(None)  # once the first rank has waited, the newest checkpoint is complete
    checkpoints = RunFolder(Path(run.config.train.run_dir)).checkpoints
    ranks = run.engine.rank, run.engine.world_size
    chosen, _ = newest_whole(checkpoints, ranks, lambda path: layout.good_step(path) in range(step))
    return chosen


def roll_back(run: Run, state: RunState, writer: CheckpointWriter) -> RunState:
    """Restores model and optimizer from the newest good checkpoint; the data continues where it is. A collective.

    Raises :class:`TrainingError` if the run has been rolled back ``train.max_rollbacks`` times, or if there is no such
    checkpoint.
    """
    config = run.config.train
    folder = Path(config.run_dir)
    if state.rollbacks >= config.max_rollbacks:
        raise TrainingError(
            f"{state.trouble}; train.max_rollbacks={config.max_rollbacks} allows no further rollback: raise it "
            "if the data may be the cause, lower optim.lr, or resume from an older checkpoint"
        )
    chosen = find_rollback_target(run, state.step, writer)
    if chosen is None:
        raise TrainingError(
            f"{state.trouble}; there is no earlier checkpoint to go back to: lower optim.lr or checkpoint.every_steps"
        )
    reader = CheckpointReader(chosen)
    is_merge_overdue(run, reader)  # raises CheckpointError before anything is written
    rollback = Rollback(
        number=state.rollbacks + 1,
        step=reader.manifest.step,
        at=state.step,
        reason=str(state.trouble),
        data_state=merge_states(gather_from_ranks(state.data)),
        data_order=run.checked.data_order,
    )
    if run.engine.rank == 0:
        known = _before(state, read_rollbacks(folder))
        write_if_possible(
            RunFolder(folder).rollbacks,
            dump_rollbacks([*known, rollback]),
            without="after a kill before the next checkpoint, the bad data would be read again; training goes on",
        )
    restored = restore(run, reader)
    restored.data = rollback.data_state
    restored.rollbacks = rollback.number
    writer.adopt_base(reader.manifest)
    shared_log.warning(
        "%s: back to step %d; the data of steps %d to %d is skipped",
        rollback.reason,
        rollback.step,
        rollback.step + 1,
        rollback.at,
    )
    return restored


def replay_rollbacks(folder: Path, state: RunState, data_order: str) -> None:
    """After a resume at a step that the run later went back to, skips the same data again. A collective.

    ``data_order`` is the fingerprint of the data order that the run uses now.
    """
    rollbacks = from_first_rank(lambda: read_rollbacks(folder))
    for rollback in rollbacks[len(_before(state, rollbacks)) :]:
        if rollback.step == state.step and rollback.data_order == data_order:  # the last match wins
            state.data = rollback.data_state
            state.rollbacks = rollback.number
            shared_log.info("the data of steps %d to %d is skipped, as after the rollback", state.step + 1, rollback.at)


def forget_rollbacks(folder: Path, state: RunState) -> None:
    """Drops the rollbacks after this state, because another history begins with it. A collective."""
    if state.rollbacks == 0:
        from_first_rank(lambda: RunFolder(folder).rollbacks.unlink(missing_ok=True))
        return
    rollbacks = from_first_rank(lambda: read_rollbacks(folder))
    kept = _before(state, rollbacks)
    if len(rollbacks) > len(kept):
        from_first_rank(lambda: write_synced(RunFolder(folder).rollbacks, dump_rollbacks(kept)))


def _before(state: RunState, rollbacks: list[Rollback]) -> list[Rollback]:
    """The rollbacks that happened before this state."""
    return [rollback for rollback in rollbacks if rollback.number <= state.rollbacks]


def read_rollbacks(folder: Path) -> list[Rollback]:
    """The rollbacks of a run, oldest first. Raises ValueError if the file is damaged."""
    path = RunFolder(folder).rollbacks
    if not path.exists():
        return []
    try:
        return [Rollback(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); it says which data to skip: restore it, or move it away to read that "
            "data again"
        ) from error


def dump_rollbacks(rollbacks: list[Rollback]) -> str:
    return json.dumps([asdict(rollback) for rollback in rollbacks], indent=1) + "\n"
