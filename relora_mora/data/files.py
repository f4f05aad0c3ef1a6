"""Opens the bytes of a shard, and decompresses its text."""

import io
import os
import re
import zlib
from collections.abc import Callable
from typing import Any

from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.network import BlockFile
from relora_mora.data.shard import COMPRESSED, Shard, version_on_disk

READ_BYTES = 1 << 16  # of a file at a time
# decompressed at once
GZIP_FEED_BYTES = 1 << 15  # their text is at most 32 MiB
ZSTD_FEED_BYTES = 1 << 13  # their text is at most 256 MiB
ZSTD_WINDOW_BYTES = 1 << 31  # the largest window that zstd writes (--long=31)
GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
_ZSTD_HEAD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)  # a frame, or a skippable one


def open_file(shard: Shard, timeout_seconds: float) -> io.BufferedReader:
    """The stored bytes of a shard, on a disk, a server, the hub or in a store. Raises SourceError."""
    raw = BlockFile(shard, timeout_seconds) if shard.is_remote else LocalFile(shard)
    return io.BufferedReader(raw, READ_BYTES)


class LocalFile(io.FileIO):
    """A file on a disk. Raises SourceError if it is another one than was found at the start.

    Raises OSError if its disk is gone (``LOST_DISK``).
    """

    def __init__(self, shard: Shard) -> None:
        self._place = shard.location
        try:
            super().__init__(shard.location)
            status = os.fstat(self.fileno())
        except OSError as error:
            raise unreadable(self._place, error, "check the path, its permissions and its disk") from error
        self.size = status.st_size
        if shard.version not in (None, version_on_disk(status)):
            self.close()
            raise SourceError(f"{self._place} was written since the start; use data that does not change")

    def readinto(self, buffer: Any) -> int:
        try:
            return super().readinto(buffer) or 0
        except OSError as error:
            raise unreadable(self._place, error, "check the disk") from error


def open_text(file: io.BufferedReader, shard: Shard) -> io.BufferedReader:
    """The text of a shard of lines, without a byte order mark.

    The first bytes of the file, not its name, show whether it is compressed. Raises SourceError, also when the text is
    read, if the compressed data is damaged or breaks off.
    """
    head = file.read(4)
    file.seek(0)
    text = file
    if head.startswith(GZIP_MAGIC):
        gzip = Decompressed(file, shard, lambda: zlib.decompressobj(wbits=31), GZIP_FEED_BYTES)
        text = io.BufferedReader(gzip, READ_BYTES)
    elif _ZSTD_HEAD.match(head):
        import zstandard

        zstd = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        text = io.BufferedReader(Decompressed(file, shard, zstd.decompressobj, ZSTD_FEED_BYTES), READ_BYTES)
    elif len(head) < 4 and shard.name.lower().endswith(COMPRESSED):
        raise _damaged(file, shard, "breaks off")
    if text.peek().startswith(BOM):
        text.read(len(BOM))
    return text


class Decompressed(io.RawIOBase):
    """The text of any number of gzip members or zstd frames.

    zstandard's own reader takes a file that breaks off for a whole one.
    """

    def __init__(self, file: io.BufferedReader, shard: Shard, new_frame: Callable[[], Any], feed_bytes: int) -> None:
        self._file = file
        self._shard = shard
        self._new_frame = new_frame
        self._feed_bytes = feed_bytes
        self._frame = new_frame()
        self._data = b""  # what follows the frame
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            data = self._data or self._file.read(self._feed_bytes)
            if self._frame.eof:
                if not data:
                    return 0
                self._frame = self._new_frame()
            try:
                self._text = memoryview(self._frame.decompress(data))
            except Exception as error:  # zlib.error or zstandard.ZstdError
                raise _damaged(self._file, self._shard, f"is damaged ({error})") from error
            if not data and not self._text:
                raise _damaged(self._file, self._shard, "breaks off")
            self._data = self._frame.unused_data if self._frame.eof else b""
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size


def _damaged(file: io.BufferedReader, shard: Shard, what: str) -> SourceError:
    return SourceError(
        f"{shard.label}: its compressed data {what} at byte {file.tell():,}; fetch the file again, or drop it"
    )
