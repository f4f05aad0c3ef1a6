"""The ends that a trainer comes to by itself: done, asked to stop, out of data. Each leaves everything saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from relora_mora.distributed import gather_from_ranks, same_on_all_ranks
from relora_mora.supervise import FINISHED, REQUEUE, Guard
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.system.words import counted
from relora_mora.train.errors import DataError, TrainingError
from relora_mora.train.events import Saving
from relora_mora.train.feed import DataFailed
from relora_mora.train.progress import next_commands
from relora_mora.train.state import RunState


class Ends:
    """Each end returns the exit code or raises, on all ranks alike; ``sync_metrics`` comes before its record."""

    def __init__(self, folder: Path, saving: Saving, guard: Guard, sync_metrics: Callable[[], None]) -> None:
        self.folder = folder
        self.saving = saving
        self.guard = guard
        self.sync_metrics = sync_metrics

    def finish(self, state: RunState) -> int:
        config = self.saving.run.config
        self.saving.save_the_end(state)
        log.info(f"done: {counted(state.step, 'step')}, {state.tokens:,} tokens, {RunFolder(self.folder).checkpoints}")
        log.info(next_commands(config.train.run_dir))
        return self._leave(FINISHED, "done")

    def stop(self, state: RunState) -> int:
        """Some rank was asked to stop."""
        reason = "; ".join(dict.fromkeys(filter(None, gather_from_ranks(self.guard.stop_reason))))
        log.info(f"stopping after step {state.step} ({reason})")
        self.saving.save_the_end(state)
        saved = (
            f"saved; {self.saving.same_command} continues from here" if state.step else "there is nothing to save yet"
        )
        log.info(f"{saved} (exit code {REQUEUE})")
        return self._leave(REQUEUE, reason)

    def fail_for_data(self, state: RunState, error: DataFailed) -> NoReturn:
        """The data of some rank has failed: all end with the same error."""
        saved = f"\nwhat was trained up to step {state.step} is saved" if state.step else ""
        try:
            self.saving.save_the_end(state)
        except TrainingError as failed:  # the disk of both may be gone
            saved = f"\n{failed}"
        lost_disk = next((failure for failure in error.failures if isinstance(failure, OSError)), None)
        if lost_disk is not None:
            raise same_on_all_ranks(lost_disk)
        text = "\n".join(dict.fromkeys(map(str, error.failures)))
        by_user = all(isinstance(failure, ValueError) for failure in error.failures)
        raise (DataError if by_user else TrainingError)(text + saved) from error

    def _leave(self, code: int, reason: str) -> int:
        self.sync_metrics()
        self.guard.decide(code, reason)
        return code
