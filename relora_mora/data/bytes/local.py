"""Reads a file on a disk, either in order or at the positions that pyarrow asks for."""

import io
import os
from abc import abstractmethod
from pathlib import Path
from typing import IO

from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.shard import Shard, Version


class RandomAccessFile(io.RawIOBase):
    """A file object of ``size`` bytes that reads with ``read_at``."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._position = 0

    @abstractmethod
    def read_at(self, position: int, size: int) -> bytes:
        """``size`` bytes from ``position`` on, all of them within the file.

        Raises SourceError if they cannot be read, OSError if the disk is gone (``LOST_DISK``).
        """

    def will_read(self, start: int, end: int) -> None:
        """A hint: the next reads lie between these two positions, and most likely cover all of it in order."""

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self._position)
        data = self.read_at(self._position, left if size < 0 else min(size, left))
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class LocalBytes:
    """``read(n)`` returns n bytes of a local file, fewer only at its end.

    Raises SourceError if the file has changed, OSError if its disk is gone (``LOST_DISK``).
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
    """A local file with random access. Raises the same errors as ``LocalBytes``."""

    _file: IO[bytes] = io.BytesIO()  # the interpreter calls close() even if __init__ could not open the file

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
    """Closes the file and raises SourceError if it is not the file that was found at the start."""
    then = shard.version
    now = Version.on_disk(os.fstat(file.fileno()))
    if then is None or then == now:
        return
    file.close()
    change = "it was written again" if then.size == now.size else f"{then.size:,} bytes then, {now.size:,} now"
    raise SourceError(f"{shard.location} changed since the start: {change}; use data that does not change")
