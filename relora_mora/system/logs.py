"""This package's log on stderr, and counts in words."""

import contextlib
import logging
import sys

from tqdm import tqdm


def counted(number: int, noun: str) -> str:
    """``1 merge``, ``0 merges``, ``1,200 merges``; the noun's plural must end with an s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


log = logging.getLogger("relora_mora")
shared_log = log.getChild("shared")  # for messages that are the same on all ranks: only the first rank shows them


class _AboveTheBar(logging.Handler):
    """Writes lines to stderr without breaking a progress bar there."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # the launcher that reads the pipe may be gone
            tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(rank: int) -> None:
    """Shows everything that the first rank logs, and only warnings and errors from the others."""
    prefix = f"[rank {rank}] " if rank else ""
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
    shared_log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
