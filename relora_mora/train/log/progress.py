"""Shows the progress of a run: log lines, on a terminal also bars, and the commands for a finished run."""

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tqdm import tqdm

from relora_mora.system.logs import log, progress_bar


class Progress:
    """Shows steps and the time left. Bars appear only on a terminal; the lines of :meth:`show` appear everywhere.

    ``total`` and ``done`` count optimizer steps. With ``show`` False (other ranks, log.progress=false), nothing is
    shown.
    """

    def __init__(self, *, total: int, done: int, show: bool) -> None:
        self.total = total
        self.done = done
        self._show = show
        self._bar = tqdm(
            total=total,
            initial=done,
            leave=False,
            disable=not (show and sys.stderr.isatty()),
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            smoothing=0.1,
        )
        self._count_from(done)

    def begin(self) -> None:
        """The first step comes next. The time left is measured from here, without an evaluation before that step."""
        self._count_from(self.done)
        self._bar.unpause()

    def update(self) -> None:
        self.done += 1
        self._bar.update()

    def go_back(self, done: int) -> None:
        """The run continues from an earlier step. The time left is measured again from there."""
        self.done = done
        self._bar.n = done
        self._bar.refresh()
        self._count_from(done)

    def show(self, values: str) -> None:
        """Logs one line, which stays above the bars."""
        if not self._show:
            return
        seconds_each = (time.monotonic() - self._begin) / max(1, self.done - self._first)
        left = tqdm.format_interval(seconds_each * (self.total - self.done))
        log.info("step %d/%d: %s, %s left", self.done, self.total, values, left)

    def evaluation(self) -> AbstractContextManager[Callable[[int, int], None]]:
        """A second bar below the bar of the steps; see :func:`progress_bar`."""
        return progress_bar("evaluation", "token", show=self._show)

    def close(self) -> None:
        self._bar.close()

    def _count_from(self, done: int) -> None:
        self._first = done
        self._begin = time.monotonic()


def next_commands(run_dir: str) -> str:
    """The commands for a finished run, one per line."""
    run = shlex.quote(run_dir)
    folder = Path(run_dir)
    export = shlex.quote(str(folder.with_name(f"{folder.name}_export")))
    return "\n".join(
        [
            "next:",
            f"  python launch/evaluate.py {run}",
            f"  python launch/export.py {run} {export}",
            f"  python launch/board.py {shlex.quote(str(folder.parent))}    # TensorBoard",
        ]
    )
