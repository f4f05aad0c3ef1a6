"""This package's log and progress bars, both on stderr, and counts in words."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

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


@contextlib.contextmanager
def progress_bar(title: str, unit: str, *, show: bool = True) -> Iterator[Callable[[float, float], None]]:
    """Shows a bar with the time left during the block; nothing without ``show`` or if stderr is not a terminal.

    Yields ``update(done, total)``, which moves the bar; both numbers count ``unit``.
    """
    hidden = None if show else True  # None: hidden unless stderr is a terminal
    with tqdm(desc=title, unit=f" {unit}", unit_scale=True, dynamic_ncols=True, leave=False, disable=hidden) as bar:

        def update(done: float, total: float) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
