"""A file that is read here and there, as pyarrow asks for it."""

from __future__ import annotations

import io
from abc import abstractmethod


class RandomAccessFile(io.RawIOBase):
    """A file object of ``size`` bytes over ``read_at``."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._position = 0

    @abstractmethod
    def read_at(self, position: int, size: int) -> bytes:
        """``size`` bytes from ``position`` on, all of them within the file.

        Raises SourceError where they cannot be read, OSError where the disk is gone (``LOST_DISK``).
        """

    def will_read(self, start: int, end: int) -> None:
        """What is read next lies between these two positions, most likely all of it and in order."""

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
