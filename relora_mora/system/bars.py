"""Progress bars on stderr, for a person who waits: only on a terminal, only on the first rank, and gone at the end."""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
APPEAR_SECONDS = 2.0  # what takes less shows no bar
_TICK_SECONDS = 0.5


def is_watched() -> bool:
    """Whether this is the first rank and its stderr is a terminal."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    with contextlib.suppress(ValueError, AttributeError):  # stderr is closed
        return rank == "0" and sys.stderr.isatty()
    return False


class Bar:
    """A bar with a count, a rate and the time left; without a ``unit``, a line with the seconds so far.

    It appears after ``after`` seconds. A thread draws it again and again, also during a long call of a library. With
    ``show`` False it never appears.
    """

    def __init__(
        self, title: str, unit: str = "", *, total: float | None = None, after: float | None = None, show: bool = True
    ) -> None:
        self._title = title
        self._unit = unit
        self._total = total
        self._after = APPEAR_SECONDS if after is None else after
        self._note = ""
        self.restart(0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True, name="bar")
        if show and is_watched():
            self._thread.start()

    def update(self, done: float, total: float | None = None) -> None:
        """Moves the bar to ``done`` of ``total`` units."""
        self._done = done
        self._total = total or self._total

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items, which are counted as they are taken."""
        for self._done, item in enumerate(items):
            yield item

    def restart(self, done: float) -> None:
        """Goes to ``done``, and measures the rate from here."""
        self._first = self._done = done
        self._begin = time.time()

    def time_left(self) -> str:
        """The time until the total is reached, at the rate since :meth:`restart`."""
        seconds_each = (time.time() - self._begin) / max(1, self._done - self._first)
        return tqdm.format_interval(seconds_each * ((self._total or 0) - self._done))

    def note(self, text: str) -> None:
        """Shows a text after the numbers."""
        self._note = text

    def close(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(1.0)  # longer only if nobody reads the terminal

    def _draw(self) -> None:
        if self._ended.wait(self._after):
            return
        layout = None if self._unit else "{desc}: {elapsed}"
        title = self._title or None
        with tqdm(desc=title, unit=f" {self._unit}", bar_format=layout, smoothing=0, leave=False, delay=1e-9) as bar:
            bar.delay = 0  # it only keeps the first picture, which would have no numbers, from being drawn
            while True:
                bar.ncols, bar.nrows = shutil.get_terminal_size()  # tqdm's own finds 0 columns on some terminals
                bar.start_t = bar.last_print_t = self._begin
                bar.initial, bar.n, bar.total = self._first, self._done, self._total
                bar.unit_scale = max(bar.n, bar.total or 0) >= 100_000  # 1.20M tokens, but 999 steps
                bar.set_postfix_str(self._note)
                if self._ended.wait(_TICK_SECONDS):
                    return

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
