"""What precedes and follows an optimizer step: loading its global batch, and judging its result.

A batch is returned once every rank has its share of it. Skipped steps may force the run back to a checkpoint.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from relora_mora.config.data import DataConfig
from relora_mora.data.stream.packing import UNSCORED, Batch
from relora_mora.data.stream.stream import TrainStream
from relora_mora.distributed.collectives import gather_from_ranks, same_on_all_ranks, sum_over_hosts
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.system.logs import counted, log, shared_log
from relora_mora.train.loop.events import Parts
from relora_mora.train.state.run_state import DataError, RunState, TrainingError

WORKER_SECONDS = 60.0  # how long a data worker may be silent, in addition to data.timeout_seconds
POLL_SECONDS = 1.0  # how often a rank that waits for data asks whether the others want to stop


class Stopping(Exception):
    """Some rank was asked to stop. Raised on all ranks."""


class DataFailed(Exception):
    """The data of some rank has failed. All ranks raise ``cause`` once they have saved."""

    def __init__(self, failures: Sequence[Exception]) -> None:
        """``failures`` has the error of each such rank."""
        text = "\n".join(dict.fromkeys(map(str, failures)))
        super().__init__(text)
        by_user = all(isinstance(failure, ValueError) for failure in failures)
        lost_disk = next((failure for failure in failures if isinstance(failure, OSError)), None)
        self.cause: Exception = (DataError if by_user else TrainingError)(text)
        if lost_disk is not None:
            self.cause = same_on_all_ranks(lost_disk)


@dataclass(frozen=True)
class LocalBatch:
    """This rank's part of a global batch."""

    batch: Batch
    scored: int  # tokens with a label in the whole global batch, over all ranks


class BatchLoader:
    def __init__(self, data: TrainStream, config: DataConfig, guard: Guard) -> None:
        self.data = data
        self.guard = guard
        self.patience = config.timeout_seconds + WORKER_SECONDS
        self.within = self.patience if config.workers else config.timeout_seconds + LONG_SECONDS
        self._noted: set[str] = set()

    def next_batch(self, step: int) -> LocalBatch:
        """The batch for ``step``, once every rank has its share.

        A collective. On all ranks, it raises :class:`Stopping` if some rank was asked to stop, and :class:`DataFailed`
        if one cannot read its data, or if its worker was killed or hangs.
        """
        batch: Batch | None = None
        failure: Exception | None = None
        scored = 0
        while True:
            self.guard.begin(f"step {step}: waiting for data", within=self.within)
            if batch is None and failure is None and self.data.ready(POLL_SECONDS):
                try:
                    batch = next(self.data)
                    scored = int((batch.labels != UNSCORED).sum())
                except (ValueError, RuntimeError, OSError) as error:
                    failure = error
            if batch is None and failure is None:
                failure = self.data.hung(self.patience)
            status = [self.guard.stop_reason is not None, batch is None, failure is not None, scored]
            stopping, waiting, failing, total_scored = sum_over_hosts([float(value) for value in status])
            if failing:
                raise DataFailed([error for error in gather_from_ranks(_portable(failure)) if error is not None])
            if stopping:
                raise Stopping
            if not waiting and batch is not None:
                break
        for note in batch.notes:
            if note not in self._noted:  # each lane and each epoch would say it again
                self._noted.add(note)
                log.warning("data: %s", note)
        return LocalBatch(batch, int(total_scored))


def _portable(failure: Exception | None) -> Exception | None:
    """A failure in a form that other ranks can unpickle: its kind and its message."""
    if failure is None or isinstance(failure, OSError):
        return failure
    return (ValueError if isinstance(failure, ValueError) else RuntimeError)(str(failure))


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step on this rank."""

    loss: float  # nats per scored token of this rank's share; the mean over the ranks is the loss of the step
    applied: bool  # the same on all ranks
    grad_norm: float
    data: list[str]  # describes the positions of the share in the training data, if the step was not applied


def judge(parts: Parts, state: RunState, result: StepResult) -> str | None:
    """Reports a skipped step; a collective if there is one. Returns why the run should go back, if it should.

    The report names the data of the ranks whose loss was not finite.
    """
    if result.applied:
        state.bad_steps = 0
        state.bad_data = []
        return None
    state.skipped_steps += 1
    state.bad_steps += 1
    own = None if math.isfinite(result.loss) else f"rank {parts.run.engine.rank}: {'; '.join(result.data)}"
    bad_data = [data for data in gather_from_ranks(own) if data] or [f"global batch {state.step}"]
    state.bad_data = [*state.bad_data, *bad_data]
    shared_log.warning(
        "step %d skipped on all ranks: gradient not finite (norm %s); its data: %s",
        state.step,
        result.grad_norm,
        " | ".join(bad_data),
    )
    parts.metrics.write(state.step, {"train/skipped_steps": state.skipped_steps, "train/skipped_data": bad_data})
    if state.bad_steps < parts.config.train.max_bad_steps:
        return None
    return (
        f"the gradient was not finite for {counted(state.bad_steps, 'step')} in a row (train.max_bad_steps), "
        f"the last is step {state.step}"
    )
