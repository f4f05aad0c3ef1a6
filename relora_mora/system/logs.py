"""The log of this package, on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys

from tqdm import tqdm

log = logging.getLogger("relora_mora")


shared_log = log.getChild("shared")  # for what all ranks know alike: the first one says it


class _AboveTheBar(logging.Handler):
    """Writes lines to stderr without tearing a progress bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # the launcher that read the pipe may be gone
            tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(rank: int) -> None:
    """Progress of the run on stderr, from the first rank; other ranks show warnings."""
    handler = _AboveTheBar()
    handler.setFormatter(
        logging.Formatter(
            "%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s [rank {rank}] %(message)s", "%H:%M:%S"
        )
    )
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
    shared_log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
