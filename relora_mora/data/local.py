"""A file object with random access, and files on disks."""

import io
import os
from abc import abstractmethod

from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.shard import Shard, Version


class ByteFile(io.RawIOBase):
    """A file object of ``size`` bytes that reads with ``read_at``."""

    size = 0
    _position = 0

    @abstractmethod
    def read_at(self, position: int, size: int) -> bytes:
        """``size`` bytes from ``position`` on, all of them within the file.

        Raises SourceError if they cannot be read, OSError if the disk is gone (``LOST_DISK``).
        """

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


class LocalFile(ByteFile):
    """A file on a disk. Raises SourceError if it is another one than was found at the start."""

    _file: io.FileIO | None = None  # the interpreter calls close() even if __init__ could not open the file

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        try:
            self._file = io.FileIO(shard.location)
            now = Version.on_disk(os.fstat(self._file.fileno()))
            misses = not now.size and self._file.read(1)
        except OSError as error:
            raise unreadable(shard.location, error, "check the path, its permissions and its disk") from error
        if misses:
            raise SourceError(
                f"{shard.location}: its disk says that it is empty, but it is not; copy it to another disk"
            )
        self.size = now.size or 0
        then = shard.version or now
        if then != now:
            self.close()
            same = "it was written again" if then.size == now.size else f"{then.size:,} bytes then, {now.size:,} now"
            raise self._changed(same)

    def read_at(self, position: int, size: int) -> bytes:
        assert self._file is not None
        try:
            self._file.seek(position)
            data = self._file.read(size)
        except OSError as error:
            raise unreadable(self._shard.location, error, "check the disk") from error
        if len(data) < size:
            raise self._changed(f"{self.size:,} bytes when it was opened, {position + len(data):,} now")
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _changed(self, change: str) -> SourceError:
        return SourceError(f"{self._shard.location} changed since the start: {change}; use data that does not change")
