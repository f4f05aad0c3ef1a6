"""Back to the last good checkpoint, and on with other data.

What happened is written to ``rollbacks.json`` of the run folder, so that a run that is killed after a rollback, and
resumes from a checkpoint of before it, skips the same data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relora_mora.checkpoint import CheckpointReader, newest_whole, read_manifest
from relora_mora.data import merge_states
from relora_mora.distributed.collectives import gather_from_ranks
from relora_mora.supervise import LONG_SECONDS
from relora_mora.system.files import write_synced
from relora_mora.system.logs import shared_log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.errors import TrainingError
from relora_mora.train.resume import restore
from relora_mora.train.rollbacks import Rollback, dump_rollbacks, read_rollbacks

if TYPE_CHECKING:
    from pathlib import Path

    from relora_mora.train.loop import Trainer


def roll_back(trainer: Trainer, why: str) -> None:
    """Takes model and optimizer from the newest checkpoint with nothing bad before it; the data goes on where it is.

    A collective. Raises :class:`TrainingError` when the run has been rolled back ``train.max_rollbacks`` times, or when
    there is no such checkpoint.
    """
    config = trainer.config.train
    trainer.guard.begin(f"step {trainer.step}: rollback", within=LONG_SECONDS)
    if trainer.rollbacks >= config.max_rollbacks:
        raise TrainingError(
            f"{why}; the run was rolled back {trainer.rollbacks} times before (train.max_rollbacks), so the data is not the cause: "
            "lower optim.lr, or resume from an older checkpoint"
        )
    trainer.writer.wait()
    gather_from_ranks(None)  # the newest checkpoint is whole when the first rank has waited
    chosen, _ = newest_whole(
        RunFolder(trainer.folder).checkpoints, trainer.engine, lambda path: _suits(path, trainer.step)
    )
    if chosen is None:
        raise TrainingError(
            f"{why}; there is no checkpoint of before it to go back to: lower optim.lr, or set checkpoint.every_steps to fewer steps"
        )
    at, rollbacks, bad_data = trainer.step, trainer.rollbacks, trainer.health.bad_data
    state = merge_states(gather_from_ranks(trainer.data_state))
    reader = CheckpointReader(chosen)
    step = reader.manifest.step
    if trainer.rank == 0:
        known = read_rollbacks(trainer.folder)[:rollbacks]
        write_synced(RunFolder(trainer.folder).rollbacks, dump_rollbacks([*known, Rollback(step, at, why, state)]))
    restore(trainer.run, reader)
    trainer.run.counters["rollbacks"] = rollbacks + 1
    trainer.begin_at(trainer.run)
    trainer.progress.go_back(step)
    if trainer.metrics is not None:
        trainer.metrics.go_back(step)
    shared_log.warning("%s: back to step %d; the data of steps %d to %d is skipped", why, step, step + 1, at)
    skipped = (
        {"train/skipped_data": bad_data} if bad_data else {}
    )  # the lines that named it are those of steps that never were
    trainer.write({"train/rollbacks": rollbacks + 1, "train/rolled_back_from": at, **skipped})


def _suits(folder: Path, step: int) -> bool:
    """Whether a checkpoint was made before a step, and nothing was wrong then."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return False
    return manifest.step < step and manifest.is_good
