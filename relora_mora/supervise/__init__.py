"""How a run ends in order: signals, launchers, lost ranks, exit codes, and one trainer per run folder.

``watchdog`` needs torch and is imported with the training code; the rest is light, so that a process can be
guarded before its slow imports.
"""

from relora_mora.supervise.environment import check_environment
from relora_mora.supervise.exits import (
    FAILED,
    FINISHED,
    LOST,
    REQUEUE,
    USER_ERROR,
    leave_process,
    record_end,
)
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.supervise.lock import LockError, RunLock

__all__ = [
    "FAILED",
    "FINISHED",
    "LONG_SECONDS",
    "LOST",
    "REQUEUE",
    "USER_ERROR",
    "Guard",
    "LockError",
    "RunLock",
    "check_environment",
    "leave_process",
    "record_end",
]
