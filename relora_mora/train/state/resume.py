"""Decides whether and where a run resumes, restores it from a checkpoint, and rolls it back to one.

A run folder has one history: checkpoints of later steps, or of another run, are renamed aside. A rollback takes a run
back to its last good checkpoint and continues with other data. A run that is killed before its next checkpoint reads
the same data again, meets the same numbers, and goes back again.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from relora_mora.adapters.mora import set_operators
from relora_mora.checkpoint import layout
from relora_mora.checkpoint.layout import CheckpointError, Manifest, list_checkpoints
from relora_mora.checkpoint.mirror import Mirror
from relora_mora.checkpoint.reader import (
    CheckpointReader,
    at_best,
    check_folder,
    find_checkpoint,
    first_whole,
    newest_manifest,
    verify,
)
from relora_mora.checkpoint.writer import CheckpointWriter
from relora_mora.config.schema import Config
from relora_mora.data.lanes import merge_states, start_states
from relora_mora.data.stream.producer import mixture_names
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks, on_all_ranks, same_on_all_ranks
from relora_mora.optim.groups import make_schedule
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.supervise.lock import RunLock
from relora_mora.system.logs import log, shared_log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.build import Run
from relora_mora.train.begin.identity import changes_since
from relora_mora.train.begin.inputs import READING_SECONDS, Inputs
from relora_mora.train.begin.run_folder import abandon_records, check_shared
from relora_mora.train.state.run_state import RunState, TrainingError
from relora_mora.weights.digests import other_weights


def take_folder(inputs: Inputs, rank: int, guard: Guard) -> tuple[Path | None, Mirror | None]:
    """Takes the run folder and its mirror for this job; a collective.

    Returns where the run goes on (see :func:`where_to_resume`) and, on the first rank, the mirror, which has filled an
    empty run folder.
    """
    config, folder = inputs.config, inputs.folder
    lock = RunLock(folder.path, guard.folder_lost)
    content = from_first_rank(lock.acquire)
    if rank == 0:
        guard.hold(lock)
    on_all_ranks(lambda: check_shared(folder.lock, content))
    guard.record_in(folder.path)
    store = config.checkpoint.mirror
    mirror = Mirror(store, folder) if store is not None and rank == 0 else None

    def find() -> Path | None:
        if mirror is not None:
            mirror.claim()
            mirror.fetch(config.train.resume)
        return where_to_resume(config)

    guard.begin("looking for a checkpoint", within=LONG_SECONDS if store is None else READING_SECONDS)
    return from_first_rank(find), mirror


def where_to_resume(config: Config) -> Path | None:
    """The checkpoint or run folder that this start resumes from; None if the run starts at step 0.

    To resume from its newest checkpoint, a run gets its own folder of checkpoints.

    A checkpoint named in ``train.resume`` is where a run begins, or one of its own that it goes back to. It is used
    once: a second start that names it continues from what the first one saved. Raises :class:`CheckpointError` if it is
    ambiguous where the run should resume.
    """
    resume = config.train.resume
    own = RunFolder(Path(config.train.run_dir)).checkpoints
    if not list_checkpoints(own):
        if resume in ("auto", "never"):
            return None
        named = at_best(Path(resume))
        check_folder(named)
        return named
    if resume == "never":
        raise CheckpointError(
            f"{own}: holds checkpoints, and train.resume=never; use another train.run_dir, or train.resume=auto"
        )
    if resume == "auto" or own.resolve() in (Path(resume).resolve(), RunFolder(Path(resume)).checkpoints.resolve()):
        return own
    previous = None
    with contextlib.suppress(CheckpointError):
        previous = newest_manifest(own).config.get("train", {}).get("resume")
    if previous == resume:
        log.warning("train.resume=%s: the run began there before, and continues from what it saved", resume)
        return own
    named = at_best(Path(resume))
    check_folder(named)
    if own.resolve() not in (named.absolute().parent.resolve(), named.resolve().parent):
        raise CheckpointError(
            f"train.resume={resume}: {own} holds checkpoints of a start that did not begin there; "
            "train.resume=auto continues from them; to begin at the one you named, give another train.run_dir"
        )
    return named


def checkpoint_at(where: Path | None, inputs: Inputs, rank: int) -> Path | None:
    """The newest checkpoint of a run, or the one at a path; None for none. A collective.

    Raises :class:`CheckpointError` if no checkpoint is complete, or if a setting differs that must not change.
    """
    if where is None:
        return None
    if where != inputs.folder.checkpoints:
        chosen: Path | None = from_first_rank(lambda: find_checkpoint(where))
    else:
        candidates = from_first_rank(lambda: list_checkpoints(where))
        chosen, problems = first_whole(candidates, _verified_by_all(rank, inputs.setup.world_size))
        for problem in problems:
            shared_log.warning("passed over %s", problem)
    if chosen is None:
        fault = f"{where}: all checkpoints in it are damaged; move them away to start again"
        raise same_on_all_ranks(CheckpointError(fault))
    found = chosen
    from_first_rank(lambda: _check_same_run(inputs, found))
    return found


def _verified_by_all(rank: int, world_size: int) -> Callable[[Path], None]:
    """A collective that verifies a checkpoint: each rank reads a share of its files."""
    return lambda path: on_all_ranks(lambda: verify(path, rank, world_size))


def _check_same_run(inputs: Inputs, checkpoint: Path) -> None:
    """Raises :class:`CheckpointError` with every difference that would change the result and is not allowed."""
    manifest = layout.read_manifest(checkpoint)
    config = inputs.config
    allowed = set(config.train.allow_changes)
    changes = [change for change in changes_since(manifest, inputs.identity) if not change.is_allowed(allowed)]
    faults = [*(change.text for change in changes), *_contradictions(manifest, config)]
    if faults:
        lines = [f"{checkpoint}: made with other settings:", *(f"  - {fault}" for fault in faults)]
        permissions = [change.permission for change in changes if change.permission is not None]
        if len(permissions) == len(faults):
            lines.append(f"to allow these changes: '--train.allow_changes=[{','.join(sorted({*permissions}))}]'")
        mirror = "" if config.checkpoint.mirror is None else " and --checkpoint.mirror"
        lines.append(f"or put them back, or give another --train.run_dir{mirror}, which begins a new run")
        raise CheckpointError("\n".join(lines))
    for name, began in other_weights(checkpoint, config.model).items():
        log.warning("%s: the run began with %s; it continues from %s and ignores them", name, began, checkpoint)


def _contradictions(manifest: Manifest, config: Config) -> Iterator[str]:
    """Why a checkpoint cannot be of a run with these settings, whatever is allowed."""
    step = manifest.step
    if step > 0 and not manifest.data_state:
        yield "data: the checkpoint does not hold its position in the data"
    if step > config.train.steps:
        yield f"train.steps: the checkpoint is already at step {step}"
        return
    clock = make_schedule(config.method, config.optim, config.train.steps)
    # a run leaves out the merge after its last step, which a longer run still has to make
    due = (clock.merges_done(step), clock.operator(step))
    owes = due[0] == manifest.merges_done + 1 and clock.merge_after(step)
    if not owes and due != (manifest.merges_done, manifest.operator):
        yield (
            f"method: the checkpoint of step {step} has made {manifest.merges_done} merges and has operator "
            f"{manifest.operator}; with these settings it would be {due[0]} and {due[1]}; resume with the method.name, "
            "merge_every, merge_until_step, operators and train.steps it was made with"
        )


def begin(run: Run) -> RunState:
    """The state of a run at step 0. Its parts are built with their initial values; a collective."""
    folder = run.inputs.folder
    if run.config.train.resume == "auto" and folder.starts.exists():
        shared_log.warning("%s: has no checkpoint to continue from, so the run begins at step 0", folder.path)
    from_first_rank(lambda: abandon_records(folder))
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
        shared_log.warning("the training data has changed (train.allow_changes): reading continues at the same lines")
    return state


def restore(run: Run, reader: CheckpointReader) -> RunState:
    """Loads tensors, operator and state of a checkpoint into a run; a collective."""
    manifest = reader.manifest
    checkpoints = run.inputs.folder.checkpoints
    # whether it belongs to the history of this run, and not to another one that this run begins from
    own = reader.folder.resolve() == (checkpoints / layout.step_folder(manifest.step)).resolve()
    state = RunState.load(manifest, own=own)
    best = state.best
    if best is not None and (
        best.metric != run.config.checkpoint.keep_best
        or not from_first_rank((checkpoints / layout.step_folder(best.step)).exists)
    ):
        state.best = None
    reader.restore(run.engine, run.base)
    set_operators(run.engine.lm, manifest.operator)
    run.merger.merges_done = manifest.merges_done
    if run.engine.rank == 0:
        _abandon_other_history(run.inputs.folder, manifest.step, own=own)
    return state


def _abandon_other_history(folder: RunFolder, step: int, *, own: bool) -> None:
    """Leaves only the history of the restored checkpoint of this step in the run folder. First rank only.

    Later checkpoints are renamed. If the checkpoint is not ``own``, so are all checkpoints and the records of the run
    that was in the folder.
    """
    others = [path for path in list_checkpoints(folder.checkpoints) if not own or (layout.step_of(path) or 0) > step]
    for path in others:
        layout.abandon(path)
    if others or not own:
        (folder.checkpoints / layout.LATEST).unlink(missing_ok=True)  # the next save writes it
    if not own:
        (folder.checkpoints / layout.BEST).unlink(missing_ok=True)
        abandon_records(folder)


def roll_back(run: Run, state: RunState, writer: CheckpointWriter, reason: str) -> RunState:
    """Restores model and optimizer from the newest good checkpoint; the data continues where it is. A collective.

    It waits for a checkpoint that is being written. Raises :class:`TrainingError` if there is no good checkpoint, and
    after ``train.max_rollbacks``.
    """
    writer.wait()
    gather_from_ranks(None)  # once the first rank has waited, the newest checkpoint is complete
    earlier = from_first_rank(
        lambda: [path for path in list_checkpoints(writer.folder) if layout.good_step(path) in range(state.step)]
    )
    chosen, _ = first_whole(earlier, _verified_by_all(run.engine.rank, run.engine.world_size))
    most = run.config.train.max_rollbacks
    if chosen is None or state.rollbacks >= most:
        why = (
            "there is no earlier checkpoint to go back to: lower optim.lr or checkpoint.every_steps"
            if chosen is None
            else f"train.max_rollbacks={most} allows no further rollback: raise it if the data may be the cause, or "
            "lower optim.lr"
        )
        raise TrainingError(f"{reason}; {why}")
    restored = restore(run, CheckpointReader(chosen))
    restored.data = merge_states(gather_from_ranks(state.data))
    restored.rollbacks = state.rollbacks + 1
    skipped = f"the data of steps {restored.step + 1} to {state.step} is skipped"
    shared_log.warning("%s: back to step %d; %s", reason, restored.step, skipped)
    return restored
