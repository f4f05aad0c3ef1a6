"""What goes wrong with text."""

from __future__ import annotations

import errno

from relora_mora.config.secrets import redact
from relora_mora.system.disk_errors import LOST_DISK


class SourceError(ValueError):
    """A source of text cannot be used: what was given, what is wrong with it, what to do.

    Holds no secret, because it is logged and saved.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def unreadable(place: str, error: OSError, remedy: str) -> Exception:
    """What to raise for local text that cannot be read.

    An OSError where its disk is gone and may come back, else a SourceError.
    """
    if error.errno in LOST_DISK:
        return OSError(error.errno, error.strerror, place)
    if error.errno == errno.EMFILE:  # each lane has a file of its own open
        remedy = "raise ulimit -n, or lower data.lanes"
    return SourceError(f"{place} cannot be read ({error.strerror}); {remedy}")


class WorkerError(RuntimeError):
    """A data worker was killed, or failed for another reason than the user's input."""
