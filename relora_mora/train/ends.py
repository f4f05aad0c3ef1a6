"""The ends that the trainer comes to by itself: done, asked to stop, out of data. Each leaves everything saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from relora_mora.distributed.collectives import gather_from_ranks
from relora_mora.supervise import FINISHED, LONG_SECONDS, REQUEUE
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.errors import DataError, TrainingError

if TYPE_CHECKING:
    from relora_mora.train.loop import Trainer


def finish(trainer: Trainer) -> int:
    """Evaluates and saves the end of the run, unless that has just been done; returns the exit code."""
    if trainer.evaluated != trainer.step and not trainer.evaluate():
        return stop(trainer)
    trainer.meet()
    trainer.trouble = None  # a spike of the last step is flagged; there is no step to make in its place
    _save_and_wait(trainer)
    log.info(f"done: {trainer.step} steps, {trainer.tokens:,} tokens, {RunFolder(trainer.folder).checkpoints}")
    _record(trainer, FINISHED, "done")
    return FINISHED


def stop(trainer: Trainer) -> int:
    """Some rank was asked to stop: all save; returns the exit code."""
    reason = "; ".join(dict.fromkeys(filter(None, gather_from_ranks(trainer.guard.stop_reason))))
    log.info(f"stopping after step {trainer.step} ({reason})")
    _save_and_wait(trainer)
    log.info(f"saved; the same command goes on from here (exit code {REQUEUE})")
    _record(trainer, REQUEUE, reason)
    return REQUEUE


def end_for_data(trainer: Trainer, failure: Exception | None) -> NoReturn:
    """The data of some rank has failed: all save, and end with the same error."""
    failures = [error for error in gather_from_ranks(_told(failure)) if error is not None]
    _save_and_wait(trainer)
    lost_disk = next((error for error in failures if isinstance(error, OSError)), None)
    if lost_disk is not None:
        lost_disk.same_on_all_ranks = True  # type: ignore[attr-defined]
        raise lost_disk
    text = "\n".join(dict.fromkeys(map(str, failures)))
    saved = f"\nwhat was trained up to step {trainer.step} is saved" if trainer.step else ""
    by_user = all(isinstance(error, ValueError) for error in failures)
    raise (DataError if by_user else TrainingError)(text + saved) from failure


def _told(failure: Exception | None) -> Exception | None:
    """What other ranks need to know of a failure: its kind and what it says."""
    if failure is None or isinstance(failure, OSError):
        return failure
    return (ValueError if isinstance(failure, ValueError) else RuntimeError)(str(failure))


def _save_and_wait(trainer: Trainer) -> None:
    """Returns when the newest checkpoint is whole; raises :class:`TrainingError` on all ranks when it could not be written."""
    if trainer.step > 0 and trainer.saved != trainer.step:
        trainer.save(at_the_end=True)
    trainer.guard.begin(f"step {trainer.step}: waiting for the checkpoint", within=LONG_SECONDS)
    trainer.writer.wait()
    failures = [failure for failure in gather_from_ranks(trainer.writer.last_failure) if failure]
    if failures:
        raise TrainingError(failures[0])


def _record(trainer: Trainer, code: int, reason: str) -> None:
    if trainer.rank == 0:
        trainer.guard.record(code, reason)
