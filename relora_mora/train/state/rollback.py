"""Back to the last good checkpoint, and on with other data.

Each rollback is written to ``rollbacks.json`` of the run folder, so that a run that is killed after it, and resumes
from a checkpoint of before it, skips the same data.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relora_mora.checkpoint.layout import read_manifest
from relora_mora.checkpoint.reader import CheckpointReader, newest_whole
from relora_mora.checkpoint.writer import CheckpointWriter
from relora_mora.data.lane_states import merge_states
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks
from relora_mora.system.files import write_if_possible, write_synced
from relora_mora.system.logs import shared_log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.build import Run
from relora_mora.train.state.restore import lacks_merge, restore
from relora_mora.train.state.run_state import RunState, TrainingError


@dataclass(frozen=True)
class Rollback:
    """The run went back from ``at`` to the checkpoint of ``step``, and on with the data behind ``at``."""

    number: int  # from 1; a full disk may have cost the note of one before
    step: int
    at: int
    reason: str
    data_state: dict[str, Any]  # of all lanes
    data_order: str  # of the data in which that is a place


def way_back(run: Run, step: int, writer: CheckpointWriter) -> Path | None:
    """The newest checkpoint of before a step with nothing bad before it. A collective; waits for one being written."""
    writer.wait()
    gather_from_ranks(None)  # the newest checkpoint is whole when the first rank has waited
    checkpoints = RunFolder(Path(run.config.train.run_dir)).checkpoints
    chosen, _ = newest_whole(checkpoints, run.engine, lambda path: _suits(path, step))
    return chosen


def roll_back(run: Run, state: RunState, writer: CheckpointWriter) -> RunState:
    """Takes model and optimizer from the newest checkpoint with nothing bad before it; the data goes on where it is.

    A collective. Raises :class:`TrainingError` when the run has been rolled back ``train.max_rollbacks`` times, or when
    there is no such checkpoint.
    """
    config = run.config.train
    folder = Path(config.run_dir)
    if state.rollbacks >= config.max_rollbacks:
        raise TrainingError(
            f"{state.trouble}; train.max_rollbacks={config.max_rollbacks} lets the run go back no further time: "
            "raise it where the data may be the cause, lower optim.lr, or resume from an older checkpoint"
        )
    chosen = way_back(run, state.step, writer)
    if chosen is None:
        raise TrainingError(
            f"{state.trouble}; there is no checkpoint of before it to go back to: lower optim.lr, or set "
            "checkpoint.every_steps to fewer steps"
        )
    reader = CheckpointReader(chosen)
    lacks_merge(run, reader)  # whether it fits the settings is told before anything is written
    rollback = Rollback(
        number=state.rollbacks + 1,
        step=reader.manifest.step,
        at=state.step,
        reason=str(state.trouble),
        data_state=merge_states(gather_from_ranks(state.data)),
        data_order=run.checked.data_order,
    )
    if run.engine.rank == 0:
        known = _until(state, read_rollbacks(folder))
        write_if_possible(
            RunFolder(folder).rollbacks,
            dump_rollbacks([*known, rollback]),
            without="a kill before the next checkpoint would have the bad data read again; training goes on",
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
    """After a resume: where the run went back to this step later, its data goes on where that left it. A collective.

    ``data_order`` is that of the data which the run reads now.
    """
    rollbacks = from_first_rank(lambda: read_rollbacks(folder))
    for rollback in rollbacks[len(_until(state, rollbacks)) :]:
        if rollback.step == state.step and rollback.data_order == data_order:  # the last one is how the run went on
            state.data = rollback.data_state
            state.rollbacks = rollback.number
            shared_log.info("the data of steps %d to %d is skipped, as after the rollback", state.step + 1, rollback.at)


def forget_rollbacks(folder: Path, state: RunState) -> None:
    """Where another history begins with this state: the rollbacks after it are none of its own. A collective."""
    if state.rollbacks == 0:
        from_first_rank(lambda: RunFolder(folder).rollbacks.unlink(missing_ok=True))
        return
    rollbacks = from_first_rank(lambda: read_rollbacks(folder))
    kept = _until(state, rollbacks)
    if len(rollbacks) > len(kept):
        from_first_rank(lambda: write_synced(RunFolder(folder).rollbacks, dump_rollbacks(kept)))


def _until(state: RunState, rollbacks: list[Rollback]) -> list[Rollback]:
    """Those that the state has behind it."""
    return [rollback for rollback in rollbacks if rollback.number <= state.rollbacks]


def read_rollbacks(folder: Path) -> list[Rollback]:
    """The rollbacks of a run, oldest first. Raises ValueError for a file that :func:`dump_rollbacks` did not give."""
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


def _suits(folder: Path, step: int) -> bool:
    """Whether a checkpoint was made before a step, and nothing was wrong then."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return False
    return manifest.step < step and manifest.is_good
