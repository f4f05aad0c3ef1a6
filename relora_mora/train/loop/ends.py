"""How a run ends: with the same exit code or error on all ranks, and with everything saved."""

from typing import NoReturn

from relora_mora.distributed.collectives import gather_from_ranks, same_on_all_ranks
from relora_mora.supervise.exits import FINISHED, REQUEUE
from relora_mora.system.logs import counted, log
from relora_mora.train.log.progress import next_commands
from relora_mora.train.loop.events import Saving
from relora_mora.train.loop.step import DataFailed
from relora_mora.train.state.run_state import DataError, RunState, TrainingError


def finish(saving: Saving, state: RunState) -> int:
    """The run has made all its steps."""
    saving.save_final(state)
    log.info(f"done: {counted(state.step, 'step')}, {state.tokens:,} tokens, {saving.writer.folder}")
    log.info(next_commands(saving.run.config.train.run_dir))
    return _leave(saving, FINISHED, "done")


def stop(saving: Saving, state: RunState) -> int:
    """Some rank was asked to stop."""
    reason = "; ".join(dict.fromkeys(filter(None, gather_from_ranks(saving.guard.stop_reason))))
    log.info(f"stopping after step {state.step} ({reason})")
    saving.save_final(state)
    saved = f"saved; {saving.resume_command} continues from here" if state.step else "there is nothing to save yet"
    log.info(f"{saved} (exit code {REQUEUE})")
    return _leave(saving, REQUEUE, reason)


def fail_for_data(saving: Saving, state: RunState, error: DataFailed) -> NoReturn:
    """The data of some rank has failed. All ranks raise the same error."""
    saved = f"\nwhat was trained up to step {state.step} is saved" if state.step else ""
    try:
        saving.save_final(state)
    except TrainingError as failed:  # data and checkpoints may be on the same lost disk
        saved = f"\n{failed}"
    lost_disk = next((failure for failure in error.failures if isinstance(failure, OSError)), None)
    if lost_disk is not None:
        raise same_on_all_ranks(lost_disk)
    text = "\n".join(dict.fromkeys(map(str, error.failures)))
    by_user = all(isinstance(failure, ValueError) for failure in error.failures)
    raise (DataError if by_user else TrainingError)(text + saved) from error


def _leave(saving: Saving, code: int, reason: str) -> int:
    saving.metrics.sync()
    saving.guard.decide(code, reason)
    return code
