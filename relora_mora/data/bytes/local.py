"""Reads a file on a disk, either in order or at the positions that pyarrow asks for."""

import io
import os
from abc import abstractmethod
from pathlib import Path
from typing import IO

from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.shard import Shard, Version


class RandomAccessFile(io.RawIOBase):
    """A file object of ``size`` bytes that reads with ``read_at``. ``position`` is the byte that is read next."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.position = 0

    @abstractmethod
    def read_at(self, position: int, size: int) -> bytes:
        """``size`` bytes from ``position`` on, all of them within the file.

        Raises SourceError if they cannot be read, OSError if the disk is gone (``LOST_DISK``).
        """

    def will_read(self, start: int, end: int) -> None:
        """A hint: the next reads lie between these two positions, and most likely cover all of it in order."""

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        data = self.read_at(self.position, left if size < 0 else min(size, left))
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class LocalFile(RandomAccessFile):
    """A local file. Raises SourceError if it is another one than was found at the start."""

    _file: IO[bytes] = io.BytesIO()  # the interpreter calls close() even if __init__ could not open the file

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._file = _open(shard)
        super().__init__(os.fstat(self._file.fileno()).st_size)
        if not self.size and self._read(0, 1):
            self._file.close()
            raise SourceError(
                f"{shard.location}: its disk says that it is empty, but it is not; copy it to another disk"
            )

    def read_at(self, position: int, size: int) -> bytes:
        data = self._read(position, size)
        if len(data) < size:
            raise _changed(self._shard, f"{self.size:,} bytes when it was opened, {position + len(data):,} now")
        return data

    def _read(self, position: int, size: int) -> bytes:
        try:
            self._file.seek(position)
            return self._file.read(size)
        except OSError as error:
            raise unreadable(self._shard.location, error, "check the disk") from error

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(shard: Shard) -> IO[bytes]:
    """Raises SourceError for a file whose size or time of modification differs from the start."""
    try:
        file = Path(shard.location).open("rb")  # noqa: SIM115
    except OSError as error:
        raise unreadable(shard.location, error, "check the path and its permissions") from error
    then = shard.version
    now = Version.on_disk(os.fstat(file.fileno()))
    if then is None or then == now:
        return file
    file.close()
    raise _changed(
        shard, "it was written again" if then.size == now.size else f"{then.size:,} bytes then, {now.size:,} now"
    )


def _changed(shard: Shard, change: str) -> SourceError:
    return SourceError(f"{shard.location} changed since the start: {change}; use data that does not change")
