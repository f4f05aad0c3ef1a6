"""Global batches, each handed out when every rank has its share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from relora_mora.config.data import DataConfig
from relora_mora.data.stream.packing import UNSCORED, Batch
from relora_mora.data.stream.stream import TrainStream
from relora_mora.distributed.collectives import gather_from_ranks, sum_over_hosts
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.system.logs import log

WORKER_SECONDS = 60.0  # that a data worker may do nothing, beyond data.timeout_seconds
POLL_SECONDS = 1.0  # a rank that waits for data looks so often whether the others want to stop


class DataFailed(Exception):
    """The data of some rank has failed. ``failures``: what each of those ranks says; the same on all ranks."""

    def __init__(self, failures: list[Exception]) -> None:
        super().__init__(*failures)
        self.failures = failures


@dataclass(frozen=True)
class LocalBatch:
    """This rank's part of a global batch."""

    batch: Batch
    scored: int  # tokens with a label in the whole global batch, over all ranks


class RankStatus(NamedTuple):
    """What the ranks tell each other while they wait for data."""

    stop: bool
    all_ready: bool
    failed: bool
    scored: int


class BatchLoader:
    def __init__(self, data: TrainStream, config: DataConfig, guard: Guard) -> None:
        self.data = data
        self.guard = guard
        self.patience = config.timeout_seconds + WORKER_SECONDS
        self.within = self.patience if config.workers else config.timeout_seconds + LONG_SECONDS

    def next_batch(self, step: int) -> LocalBatch | None:
        """The batch for ``step`` when every rank has its share; None when some rank was asked to stop.

        A collective. Raises :class:`DataFailed` on all ranks when the data of one cannot be read, or its worker was
        killed or hangs.
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
            meeting = self._meet(ready=batch is not None, failed=failure is not None, scored=scored)
            if meeting.failed:
                raise DataFailed([error for error in gather_from_ranks(_told(failure)) if error is not None])
            if meeting.stop:
                return None
            if meeting.all_ready and batch is not None:
                break
        for note in batch.notes:
            log.warning("data: %s", note)
        return LocalBatch(batch, meeting.scored)

    def _meet(self, *, ready: bool, failed: bool, scored: int) -> RankStatus:
        told = [self.guard.stop_reason is not None, not ready, failed, scored]
        stops, waiting, failures, total = sum_over_hosts([float(value) for value in told])
        return RankStatus(stop=stops > 0, all_ready=waiting == 0, failed=failures > 0, scored=int(total))


def _told(failure: Exception | None) -> Exception | None:
    """What other ranks need to know of a failure: its kind and what it says."""
    if failure is None or isinstance(failure, OSError):
        return failure
    return (ValueError if isinstance(failure, ValueError) else RuntimeError)(str(failure))
