"""Metrics of a run: one JSON object a line, and the same numbers for TensorBoard. First rank only."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.tensorboard import TensorBoard


class Metrics:
    """Writes ``metrics.jsonl`` and ``tensorboard/`` of a run folder.

    After a resume at ``step``, what an earlier process logged beyond it is dropped from the file and hidden in
    TensorBoard, because those steps are made again. A line that cannot be written (the disk is full) is lost, with a
    warning, and training goes on.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        files = RunFolder(folder)
        self.path = files.metrics
        self._board_folder = files.tensorboard if tensorboard else None
        self._board: TensorBoard | None = None
        self._file: int | None = None
        self._losing = False
        self._open(step)
        if step == 0 and self._board is not None:
            self._board.describe(files.config.read_text(encoding="utf-8"))

    def go_back(self, step: int) -> None:
        """Drops what was logged beyond ``step``: the run goes on from there."""
        self.close()
        self._open(step)

    def _open(self, step: int) -> None:
        self._keep_until(step)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._open_board(step + 1)

    def _open_board(self, step: int) -> None:
        if self._board_folder is not None:
            self._board = TensorBoard(self._board_folder, step)

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
        """One line of the file, and a point for each number that is a curve in TensorBoard."""
        finite = {
            tag: None if isinstance(value, float) and not math.isfinite(value) else value
            for tag, value in values.items()
        }
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False) + "\n"
        try:
            self._append(line.encode())
            if self._board is None:  # closed after a fault of the disk
                self._open_board(step)
            if self._board is not None:
                self._board.write(step, values)
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
        """The whole line or nothing: a disk that fills up would take a part of it."""
        assert self._file is not None, "closed"
        before = os.fstat(self._file).st_size
        written = os.write(self._file, line)
        if written < len(line):
            os.ftruncate(self._file, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._close_board()

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None
