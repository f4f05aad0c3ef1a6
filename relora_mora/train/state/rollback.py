"""Takes a run back to its last good checkpoint and continues with other data.

Each rollback is written to ``rollbacks.json`` in the run folder. A run that is killed after the rollback and resumes
from an earlier checkpoint then skips the same data.
"""

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
from relora_mora.train.state.restore import is_merge_overdue, restore
from relora_mora.train.state.run_state import RunState, TrainingError


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
    chosen, _ = newest_whole(checkpoints, run.engine, lambda path: _is_good_before(path, step))
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


def _is_good_before(folder: Path, step: int) -> bool:
    """Whether a checkpoint was made before a step, and while nothing was wrong."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return False
    return manifest.step < step and manifest.is_good
