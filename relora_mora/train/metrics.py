"""Metrics of a run: one JSON object a line, and the same numbers for TensorBoard. First rank only."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder

ONLY_IN_FILE = {"merge/layers", "merge/zeroed_elements", "merge/operator_before", "eval/tokens"}


class Metrics:
    """Writes ``metrics.jsonl`` and ``tensorboard/`` of a run folder.

    After a resume at ``step`` what an earlier process logged beyond it is dropped from the file and hidden in
    TensorBoard: those steps are made again. A line that cannot be written (full disk) is lost, with a warning; training
    goes on.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        self.path, self._folder, self._tensorboard = RunFolder(folder).metrics, folder, tensorboard
        self._losing = False
        self._handle: int | None = None
        self._board: SummaryWriter | None = None
        self._open(step)
        if step == 0 and self._board is not None:
            self._board.add_text(
                "run/config", "    " + RunFolder(folder).config.read_text(encoding="utf-8").replace("\n", "\n    "), 0
            )

    def _open(self, step: int) -> None:
        self._keep_until(step)
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._open_board(step + 1)

    def _open_board(self, step: int) -> None:
        """What earlier files of TensorBoard hold from ``step`` on is hidden."""
        if self._tensorboard:
            threading.excepthook = _without_lost_events
            self._board = SummaryWriter(str(RunFolder(self._folder).tensorboard), purge_step=step, flush_secs=10)

    def go_back(self, step: int) -> None:
        """Drops what was logged beyond ``step``: the run goes on from there."""
        self.close()
        self._open(step)

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step and step > 0:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                log.warning("metrics.jsonl: dropped a damaged line")
        beside = self.path.with_name(self.path.name + ".tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(self.path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line. Numbers also go to TensorBoard under the same tags, but for what is the same at every merge."""
        finite = {
            tag: None if isinstance(value, float) and not math.isfinite(value) else value
            for tag, value in values.items()
        }
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False) + "\n"
        try:
            self._append(line.encode())
            if self._board is None:  # its thread has ended with what could not be written
                self._open_board(step)
            for tag, value in values.items():
                if self._board is not None and isinstance(value, int | float) and tag not in ONLY_IN_FILE:
                    self._board.add_scalar(tag, value, step)
        except OSError as error:
            if not self._losing:
                log.error(
                    "metrics cannot be written (%s): lines are lost until that is mended; training goes on",
                    error.strerror or error,
                )
            self._losing = True
            self._close_board()
        else:
            self._losing = False

    def _append(self, line: bytes) -> None:
        """The whole line or nothing of it: a disk that fills up takes a part."""
        assert self._handle is not None, "closed"
        before = os.fstat(self._handle).st_size
        written = os.write(self._handle, line)
        if written < len(line):
            os.ftruncate(self._handle, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)
        self._close_board()

    def _close_board(self) -> None:
        board, self._board = self._board, None
        if board is not None:
            with contextlib.suppress(OSError):
                board.close()


def _without_lost_events(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread ends with an error of the disk, which the next line of metrics meets again and reports."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)
