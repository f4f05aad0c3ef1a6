"""Metrics of a run: one JSON object a line, and the same numbers for other loggers. First rank only."""

from __future__ import annotations

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
    """Where metrics go beside ``metrics.jsonl``: a class with these, made in ``loggers.py``.

    Any of them may raise whatever it likes, at any time: that is said once, and training goes on. The next ``write`` is
    tried again.
    """

    title: str  # in messages

    def open(self, step: int) -> None:
        """A run begins (0) or goes on behind a step. What was written of later steps will be written again.

        Called before the first ``write``, and again where the run goes back to an earlier step.
        """

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of one event, under the tags of docs/metrics.md; other values than int and float are texts."""

    def close(self) -> None:
        """The process ends; the run may go on in another one."""


class Metrics:
    """Writes ``metrics.jsonl`` of a run folder, and hands the same to loggers.

    After a resume at ``step``, what an earlier process logged beyond it is dropped from the file, because those steps
    are made again. If the evaluation or the merge of ``step`` is made again (not ``evaluated``, not ``merged``), its
    line is dropped, and with it what followed: the checkpoint that has it was not finished. A line that cannot be
    written (the disk is full) is lost, with a warning, and training goes on.
    """

    def __init__(
        self, folder: Path, *, step: int, evaluated: bool = True, merged: bool = True, loggers: Sequence[Logger] = ()
    ) -> None:
        self.path = RunFolder(folder).metrics
        self._loggers = loggers
        self._file: int | None = None
        self._losing: set[str] = set()
        self._step = step
        self._evaluated = evaluated
        self._merged = merged
        self._open_file()
        self._open_loggers()

    def go_back(self, step: int, *, merged: bool = True) -> None:
        """Drops what was logged beyond ``step``: the run goes on from there."""
        self._close_file()
        self._step = step
        self._evaluated = True
        self._merged = merged
        self._try(self.path.name, self._open_file)
        self._open_loggers()

    def _open_file(self) -> int:
        self._keep_until(self._step)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        return self._file

    def _open_loggers(self) -> None:
        for logger in self._loggers:
            self._try(logger.title, partial(logger.open, self._step))

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        before = self.path.read_text(encoding="utf-8", errors="replace")
        kept = []
        made_again = {"eval/seconds": not self._evaluated, "merge/seconds": not self._merged}
        again = False
        for line in before.splitlines():
            try:
                values = json.loads(line)
                of_step = values["step"] == step
                again = again or (of_step and any(made_again[tag] for tag in made_again.keys() & values.keys()))
                if 0 < step >= values["step"] and not again:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                log.warning("metrics.jsonl: dropped a damaged line")
        text = "".join(kept)
        if text != before:  # a run that is done writes nothing, where the disk may be full
            write_synced(self.path, text)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of the file, and the same for each logger."""
        finite = {
            tag: None if isinstance(value, float) and not math.isfinite(value) else value
            for tag, value in values.items()
        }
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False) + "\n"
        self._try(self.path.name, lambda: self._append(line.encode()))
        for logger in self._loggers:
            self._try(logger.title, partial(logger.write, step, values))

    def _try(self, where: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            if where not in self._losing:
                said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                log.error(
                    "%s: metrics cannot be written (%s): they are missing there; training goes on",
                    where,
                    redact(" ".join(said.split()) or type(error).__name__),
                )
            self._losing.add(where)
        else:
            self._losing.discard(where)

    def _append(self, line: bytes) -> None:
        file = self._open_file() if self._file is None else self._file  # the disk was full when the run went back
        append_whole(file, line)

    def sync(self) -> None:
        """What is written stays through a power cut, as checkpoints do: they say what has been evaluated."""
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
