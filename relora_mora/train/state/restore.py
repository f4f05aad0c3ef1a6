"""Restores a run from a checkpoint, at a resume or at a rollback.

A run folder has one history: checkpoints of later steps, or of another run, are renamed aside. A rollback takes a run
back to its last good checkpoint and continues with other data. A run that is killed before its next checkpoint reads
the same data again, meets the same numbers, and goes back again.
"""

from pathlib import Path

from relora_mora.checkpoint import layout
from relora_mora.checkpoint.reader import CheckpointReader, newest_whole
from relora_mora.checkpoint.writer import CheckpointWriter
from relora_mora.config.schema import Config
from relora_mora.data.lanes import merge_states
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks, same_on_all_ranks
from relora_mora.system.files import write_if_possible
from relora_mora.system.logs import counted, log, shared_log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.build import Run
from relora_mora.train.begin.run_folder import abandon_records
from relora_mora.train.log.report import merge_metrics
from relora_mora.train.state.run_state import Best, RunState, TrainingError, Trouble


def restore(run: Run, reader: CheckpointReader) -> RunState:
    """Loads tensors, operator and state of a checkpoint into a run, and makes a merge that is overdue; a collective.

    A run leaves out the merge after its last step, and its export includes it instead; a longer run has to make it.
    Raises :class:`CheckpointError`, before anything changes, if the merges of the checkpoint contradict the settings.
    """
    manifest = reader.manifest
    own = _is_own(run, reader)
    state = RunState.load(manifest, own=own)
    state.best = kept_best(run.config, state.best)
    is_overdue = is_merge_overdue(run, reader)
    reader.restore(run.engine, run.base)
    run.merger.set_operator(manifest.operator)
    run.merger.merges_done = manifest.merges_done
    if run.engine.rank == 0:
        _abandon_other_history(RunFolder(Path(run.config.train.run_dir)), reader, own=own)
    now = run.inputs
    if (manifest.data_fingerprint, manifest.data_content) != (now.data_fingerprint, now.data_content):
        state.health.begin_window()
    if is_overdue:
        merges_done = run.schedule.merges_done(state.step)
        record = run.merger.merge(state.step, merges_done, run.schedule.operator(state.step))
        state.done_at_load = merge_metrics(record)
        log.info("step %d: made the merge that was due here, which the shorter run had left to its export", state.step)
    return state


def kept_best(config: Config, best: Best | None) -> Best | None:
    """The best checkpoint so far; None if it is gone, or if ``checkpoint.keep_best`` names another metric now.

    A collective.
    """
    if best is None or best.metric != config.checkpoint.keep_best:
        return None
    folder = RunFolder(Path(config.train.run_dir)).checkpoints / layout.step_folder(best.step)
    return best if from_first_rank(folder.exists) else None


def _is_own(run: Run, reader: CheckpointReader) -> bool:
    """Whether a checkpoint belongs to the history of this run, and not to another one that this run begins from."""
    own = RunFolder(Path(run.config.train.run_dir)).checkpoints / layout.step_folder(reader.manifest.step)
    return reader.folder.resolve() == own.resolve()


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
    others = [
        path for path in layout.list_checkpoints(folder.checkpoints) if not own or (layout.step_of(path) or 0) > step
    ]
    for path in others:
        layout.abandon(path)
    if not own:
        latest.unlink(missing_ok=True)
        (folder.checkpoints / layout.BEST).unlink(missing_ok=True)
        abandon_records(folder)
    elif others:
        write_if_possible(latest, f"{layout.step_folder(step)}\n", without="it names another one; training goes on")


def roll_back(run: Run, state: RunState, writer: CheckpointWriter, trouble: Trouble) -> RunState | None:
    """Restores model and optimizer from the newest good checkpoint; the data continues where it is. A collective.

    It waits for a checkpoint that is being written. Returns None if there is no such checkpoint and the trouble does
    not force the run back. Raises :class:`TrainingError` if it does, and if the run has been rolled back
    ``train.max_rollbacks`` times.
    """
    config = run.config.train
    ranks = run.engine.rank, run.engine.world_size
    writer.wait()
    gather_from_ranks(None)  # once the first rank has waited, the newest checkpoint is complete
    chosen, _ = newest_whole(writer.folder, ranks, lambda path: layout.good_step(path) in range(state.step))
    if chosen is None and not trouble.must:
        return None
    if state.rollbacks >= config.max_rollbacks:
        raise TrainingError(
            f"{trouble.reason}; train.max_rollbacks={config.max_rollbacks} allows no further rollback: raise it "
            "if the data may be the cause, lower optim.lr, or resume from an older checkpoint"
        )
    if chosen is None:
        raise TrainingError(
            f"{trouble.reason}; there is no earlier checkpoint to go back to: lower optim.lr or checkpoint.every_steps"
        )
    restored = restore(run, CheckpointReader(chosen))
    restored.data = merge_states(gather_from_ranks(state.data))
    restored.rollbacks = state.rollbacks + 1
    shared_log.warning(
        "%s: back to step %d; the data of steps %d to %d is skipped",
        trouble.reason,
        restored.step,
        restored.step + 1,
        state.step,
    )
    return restored
