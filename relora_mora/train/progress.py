"""How far a run is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from relora_mora.system.logs import log


class Progress:
    """Loss, perplexity, tokens/s and the time left: a bar on a terminal, a plain line at each :meth:`show` elsewhere."""

    def __init__(self, *, total: int, done: int, show: bool) -> None:
        self._plain = show and not sys.stderr.isatty()
        self._begin, self._first = time.monotonic(), done
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not show or self._plain,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            smoothing=0.1,
        )
        self.done, self.total = done, total

    def go_back(self, done: int) -> None:
        self.done = self._bar.n = self._first = done
        self._begin = time.monotonic()

    def update(self) -> None:
        self.done += 1
        self._bar.update()

    def show(self, **values: str) -> None:
        """What stands behind the bar, or one plain line."""
        if self._plain:
            each = (time.monotonic() - self._begin) / max(1, self.done - self._first)
            left = tqdm.format_interval(each * (self.total - self.done))
            log.info(
                "step %d/%d: %s, %s left",
                self.done,
                self.total,
                ", ".join(f"{key} {value}" for key, value in values.items()),
                left,
            )
        else:
            self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        self._bar.close()
