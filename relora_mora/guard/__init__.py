"""Ends that are no accident: signals, launchers, lost ranks, and one trainer per run folder.

``watch`` needs torch and is imported when there are ranks to watch; the rest is light, so that a process can be guarded
before its slow imports.
"""

from relora_mora.guard.environment import check_environment
from relora_mora.guard.exits import FAILED, FINISHED, LOST, LOST_DISK, REQUEUE, USER_ERROR, leave_now, leave_process, record_end
from relora_mora.guard.guard import LONG_SECONDS, Guard
from relora_mora.guard.lock import LockError, RunLock

__all__ = [
    "FAILED",
    "FINISHED",
    "LONG_SECONDS",
    "LOST",
    "LOST_DISK",
    "REQUEUE",
    "USER_ERROR",
    "Guard",
    "LockError",
    "RunLock",
    "check_environment",
    "leave_now",
    "leave_process",
    "record_end",
]
