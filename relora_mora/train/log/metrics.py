"""Writes the metrics of a run, one JSON object per line, and passes them on to other loggers. First rank only."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from relora_mora.config.secrets import redact
from relora_mora.system.files import append_whole, write_synced
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder


class Logger(Protocol):
    """Another destination of metrics besides ``metrics.jsonl``, created in ``loggers.py``.

    Each method may raise any exception at any time. The error is reported once, training goes on, and the next
    ``write`` tries again.
    """

    title: str  # in messages

    def open(self, step: int) -> None:
        """A run begins (0) or continues after a step. Later steps will be written again.

        Called before the first ``write``, and again if the run goes back to an earlier step.
        """

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one event, with the tags of docs/metrics.md. Values that are not int or float are text."""

    def close(self) -> None:
        """The process ends. The run may continue in another one."""


class Metrics:
    """Writes ``metrics.jsonl`` in a run folder, and passes the same values to loggers.

    After a resume at ``step``, lines of later steps are dropped from the file, because those steps are repeated. If the
    evaluation or the merge of ``step`` is repeated (not ``evaluated``, not ``merged``), its line and all lines after it
    are dropped, since the checkpoint that includes it was not finished. A line that cannot be written, such as on a
    full disk, is lost with one message, and training goes on.
    """

    def __init__(
        self, folder: Path, *, step: int, evaluated: bool = True, merged: bool = True, loggers: Sequence[Logger] = ()
    ) -> None:
        self.path = RunFolder(folder).metrics
        self._loggers = loggers
        self._file: int | None = None
        self._failing: set[str] = set()
        self._step = step
        self._evaluated = evaluated
        self._merged = merged
        self._open_file()
        self._open_loggers()

    def go_back(self, step: int, *, merged: bool = True) -> None:
        """Drops everything logged after ``step``, because the run continues from there."""
        self._close_file()
        self._step = step
        self._evaluated = True
        self._merged = merged
        self._try(self.path.name, self._open_file)
        self._open_loggers()

    def _open_file(self) -> int:
        self._drop_after(self._step)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        return self._file

    def _open_loggers(self) -> None:
        for logger in self._loggers:
            self._try(logger.title, partial(logger.open, self._step))

    def _drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        before = self.path.read_text(encoding="utf-8", errors="replace")
        kept = []
        repeated = {"eval/seconds": not self._evaluated, "merge/seconds": not self._merged}
        is_repeated = False
        for line in before.splitlines():
            try:
                values = json.loads(line)
                if values["step"] == step and any(repeated[tag] for tag in repeated.keys() & values.keys()):
                    is_repeated = True
                if 0 < step >= values["step"] and not is_repeated:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                log.warning("metrics.jsonl: dropped a damaged line")
        text = "".join(kept)
        if text != before:  # a finished run writes nothing, since the disk may be full
            write_synced(self.path, text)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one event to the file and to each logger."""
        finite = {
            tag: None if isinstance(value, float) and not math.isfinite(value) else value
            for tag, value in values.items()
        }
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False) + "\n"
        # the file is None if the disk was full in go_back
        self._try(
            self.path.name,
            lambda: append_whole(self._open_file() if self._file is None else self._file, line.encode()),
        )
        for logger in self._loggers:
            self._try(logger.title, partial(logger.write, step, values))

    def _try(self, target: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            if target not in self._failing:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                log.error(
                    "%s: metrics cannot be written (%s) and will be missing there; training goes on",
                    target,
                    redact(" ".join(reason.split()) or type(error).__name__),
                )
            self._failing.add(target)
        else:
            self._failing.discard(target)

    def sync(self) -> None:
        """Makes the lines so far survive a power cut, as checkpoints do, which record what has been evaluated."""
        handle = self._file
        if handle is not None:
            self._try(self.path.name, lambda: os.fsync(handle))

    def close(self) -> None:
        self.sync()
        self._close_file()
        for logger in self._loggers:
            with contextlib.suppress(Exception):
                logger.close()

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
