"""The bytes of a file on a disk."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO

from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.random_access import RandomAccessFile
from relora_mora.data.sources import Shard


class LocalBytes:
    """``read(n)`` gives n bytes of a local file, fewer only at its end.

    Raises SourceError where the file is not what it was, OSError where its disk is gone (``LOST_DISK``).
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.size = shard.size
        self.position = 0
        self._file = _open(shard)

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise unreadable(self.shard.location, error, "check the disk") from error
        if len(data) < size:
            _check_size(self.shard, self._file)
        self.position += len(data)
        return data

    def close(self) -> None:
        self._file.close()


class LocalFile(RandomAccessFile):
    """The same bytes, read here and there."""

    _file: IO[bytes] = io.BytesIO()  # the interpreter closes one, too, that could not be opened

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._file = _open(shard)
        super().__init__(os.fstat(self._file.fileno()).st_size)

    def read_at(self, position: int, size: int) -> bytes:
        try:
            self._file.seek(position)
            data = self._file.read(size)
        except OSError as error:
            raise unreadable(self._shard.location, error, "check the disk") from error
        if len(data) < size:
            _check_size(self._shard, self._file)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(shard: Shard) -> IO[bytes]:
    try:
        file = Path(shard.location).open("rb")  # noqa: SIM115
    except OSError as error:
        raise unreadable(shard.location, error, "check the path and its permissions") from error
    _check_size(shard, file)
    return file


def _check_size(shard: Shard, file: IO[bytes]) -> None:
    """Raises SourceError, with the file closed, where its size is not what it was when it was found."""
    size = os.fstat(file.fileno()).st_size
    if shard.size is not None and size != shard.size:
        file.close()
        raise SourceError(
            f"{shard.location} changed since the start: {shard.size:,} bytes then, {size:,} now; "
            "start with data that does not change"
        )
