"""Opens the bytes of a shard, and decompresses its text."""

import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.shard import COMPRESSED, Shard, Version

if TYPE_CHECKING:
    from relora_mora.data.remote import BlockFile

READ_BYTES = 1 << 16  # of a file at a time
PIECE_BYTES = 1 << 18  # the largest piece of text from gzip
ZSTD_FEED_BYTES = 1 << 13  # zstd has no limit on its output, but 8 KiB decompress to at most 256 MiB
ZSTD_WINDOW_BYTES = 1 << 31  # the largest window that zstd writes (--long=31)
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_HEAD = re.compile(re.escape(ZSTD_MAGIC) + rb"|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)  # a frame, or a skippable one


def open_file(shard: Shard, timeout_seconds: float) -> "LocalFile | BlockFile":
    """The stored bytes of a shard, on a disk, a server, the hub or in a store. Raises SourceError."""
    if not shard.is_remote:
        return LocalFile(shard)
    from relora_mora.data.remote import open_remote  # late, because local text needs none of its libraries

    return open_remote(shard, timeout_seconds)


class LocalFile(io.FileIO):
    """A file on a disk, up to the ``size`` that it had when it was opened; some disks report no size.

    Raises SourceError if it is another one than was found at the start, OSError if its disk is gone (``LOST_DISK``).
    """

    def __init__(self, shard: Shard) -> None:
        self._place = shard.location
        try:
            super().__init__(shard.location)
            now = Version.on_disk(os.fstat(self.fileno()))
        except OSError as error:
            raise unreadable(self._place, error, "check the path, its permissions and its disk") from error
        self.size = now.size or 0
        then = shard.version or now
        if then != now:
            self.close()
            same = "it was written again" if then.size == now.size else f"{then.size:,} bytes then, {now.size:,} now"
            raise self._changed(same)

    def read(self, size: int | None = -1) -> bytes:
        position = self.tell()
        if self.size:
            left = max(0, self.size - position)
            size = left if size is None or size < 0 else min(size, left)
        try:
            data = super().read(size)
        except OSError as error:
            raise unreadable(self._place, error, "check the disk") from error
        if self.size and len(data) < (size or 0):
            raise self._changed(f"{self.size:,} bytes when it was opened, {position + len(data):,} now")
        return data

    def _changed(self, change: str) -> SourceError:
        return SourceError(f"{self._place} changed since the start: {change}; use data that does not change")


def text_pieces(file: "LocalFile | BlockFile", shard: Shard) -> Iterator[bytes]:
    """The text of a shard of lines, in pieces. Its first bytes, not its name, show whether it is compressed.

    Raises SourceError after the last piece that can be read, if the compressed data is damaged or breaks off.
    """

    def damage(what: str) -> SourceError:
        return SourceError(
            f"{shard.label}: its compressed data {what} byte {file.tell():,}; "
            "expected a complete gzip or zstd file: fetch it again, or drop it"
        )

    head = file.read(len(ZSTD_MAGIC))
    file.seek(0)
    if head.startswith(GZIP_MAGIC):
        # only zlib takes a limit on the size of a piece
        yield from _decompressed(file, READ_BYTES, lambda: zlib.decompressobj(wbits=31), damage, PIECE_BYTES)
    elif _ZSTD_HEAD.match(head):
        import zstandard

        zstd = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        yield from _decompressed(file, ZSTD_FEED_BYTES, zstd.decompressobj, damage)
    elif shard.name.lower().endswith(COMPRESSED) and file.size < len(ZSTD_MAGIC):
        file.seek(file.size)
        raise damage("breaks off at")
    else:
        yield from iter(lambda: file.read(READ_BYTES), b"")


def _decompressed(
    file: "LocalFile | BlockFile",
    feed_bytes: int,
    new_frame: Callable[[], Any],
    damage: Callable[[str], SourceError],
    *limit: int,
) -> Iterator[bytes]:
    """The text of any number of gzip members or zstd frames.

    Memory for zstd grows with the text, up to the window of a frame, which is at most 2 GiB. zstandard's own reader
    takes a file that breaks off for a whole one.
    """
    frame = new_frame()
    data = b""
    while True:
        data = data or file.read(feed_bytes)
        at_end = not data
        if frame.eof:
            if at_end:
                return
            frame = new_frame()
        try:
            piece = frame.decompress(data, *limit)
        except Exception as error:  # zlib.error or zstandard.ZstdError
            raise damage(f"is damaged ({error}) before") from error
        if piece:
            yield piece
        elif at_end:
            raise damage("breaks off at")
        data = frame.unused_data if frame.eof else getattr(frame, "unconsumed_tail", b"")
