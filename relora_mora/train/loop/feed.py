"""Loads global batches. A batch is returned once every rank has its share of it."""

from dataclasses import dataclass

from relora_mora.config.data import DataConfig
from relora_mora.data.stream.packing import UNSCORED, Batch
from relora_mora.data.stream.stream import TrainStream
from relora_mora.distributed.collectives import gather_from_ranks, sum_over_hosts
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.system.logs import log

WORKER_SECONDS = 60.0  # how long a data worker may be silent, in addition to data.timeout_seconds
POLL_SECONDS = 1.0  # how often a rank that waits for data asks whether the others want to stop


class DataFailed(Exception):
    """The data of some rank has failed. ``failures`` has the error of each such rank; it is the same on all ranks."""

    def __init__(self, failures: list[Exception]) -> None:
        super().__init__(*failures)
        self.failures = failures


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

    def next_batch(self, step: int) -> LocalBatch | None:
        """The batch for ``step``, once every rank has its share; None if some rank was asked to stop.

        A collective. Raises :class:`DataFailed` on all ranks if one cannot read its data, or if its worker was killed
        or hangs.
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
                return None
            if not waiting and batch is not None:
                break
        for note in batch.notes:
            log.warning("data: %s", note)
        return LocalBatch(batch, int(total_scored))


def _portable(failure: Exception | None) -> Exception | None:
    """A failure in a form that other ranks can unpickle: its kind and its message."""
    if failure is None or isinstance(failure, OSError):
        return failure
    return (ValueError if isinstance(failure, ValueError) else RuntimeError)(str(failure))
