"""The bytes of a file on a disk."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO

from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.file_version import Version
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
        _check_version(self.shard, self._file)
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
        _check_version(self._shard, self._file)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(shard: Shard) -> IO[bytes]:
    try:
        file = Path(shard.location).open("rb")  # noqa: SIM115
    except OSError as error:
        raise unreadable(shard.location, error, "check the path and its permissions") from error
    _check_version(shard, file)
    return file


def _check_version(shard: Shard, file: IO[bytes]) -> None:
    """Raises SourceError, with the file closed, if it is not the file that was found at the start."""
    then = shard.version
    now = Version.on_disk(os.fstat(file.fileno()))
    if then is None or then == now:
        return
    file.close()
    change = "it was written again" if then.size == now.size else f"{then.size:,} bytes then, {now.size:,} now"
    raise SourceError(f"{shard.location} changed since the start: {change}; start with data that does not change")
