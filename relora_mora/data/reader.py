"""The lines of a shard: bytes, decompressed in bounded pieces, cut at newlines, with a limit on their length.

What is wrong with a shard becomes a ``BadLine`` at a definite row, so every later decision about it is the same each
time the shard is read.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.sources import Shard

CHUNK_BYTES = 1 << 16  # of the file; always whole chunks, so that a damaged shard fails at the same place every time
PIECE_BYTES = 1 << 20  # the most that gzip may give at once
ZSTD_FEED_BYTES = 1 << 10  # zstd has no such limit, but 1 KiB holds at most 32 MiB
GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)  # of a frame, and of one to pass over
ZSTD_WINDOW_BYTES = 1 << 31  # the most that zstd writes (--long=31)
BOM = b"\xef\xbb\xbf"

Read = Callable[[int], bytes]


@dataclass(frozen=True)
class BadLine:
    """Stands where a line cannot be given: it is too long, or the shard broke off here."""

    kind: str


class DamagedShardError(Exception):
    """The compressed stream ends here. ``kind`` is ``truncated`` or ``corrupt``."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class LocalBytes:
    """``read(n)`` gives n bytes of a local file, fewer only at its end.

    Raises SourceError where the file is not what it was, OSError where its disk is gone (``LOST_DISK``).
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        try:
            self._file = Path(shard.location).open("rb")  # noqa: SIM115
        except OSError as error:
            raise unreadable(shard.location, error, "check the path and its permissions") from error
        self._check_size()

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise unreadable(self.shard.location, error, "check the disk") from error
        if len(data) < size:
            self._check_size()
        return data

    def _check_size(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if self.shard.size is not None and size != self.shard.size:
            self.close()
            raise SourceError(
                f"{self.shard.location} changed since the start: {self.shard.size:,} bytes then, {size:,} now; start with data that does not change"
            )

    def doubt_end(self) -> bool:
        return False

    def close(self) -> None:
        self._file.close()


class ShardLines:
    """The rows of one shard, in order. ``row`` is the number of the row that ``take`` gives next, from 0."""

    def __init__(self, shard: Shard, *, max_line_bytes: int, timeout_seconds: float) -> None:
        self.shard, self.row = shard, 0
        self.looks_like: str | None = None
        if shard.is_remote:
            from relora_mora.data.remote import RemoteBytes

            self._raw: LocalBytes | RemoteBytes = RemoteBytes(shard, timeout_seconds)
        else:
            self._raw = LocalBytes(shard)
        self._limit = max_line_bytes
        self._pieces = self._decompressed()
        self._rows: list[bytes | BadLine] = []  # complete, not yet taken from _next on
        self._next = 0
        self._partial: list[bytes] = []  # the beginning of a row whose newline has not come yet
        self._partial_bytes = 0
        self._ended = False

    def __enter__(self) -> ShardLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._raw.close()

    def skip(self, rows: int) -> bool:
        """Pass over rows without looking into them; False when the shard ends before."""
        while rows:
            if self._next == len(self._rows) and not self._refill():
                return False
            step = min(rows, len(self._rows) - self._next)
            self._next += step
            self.row += step
            rows -= step
        return True

    def take(self) -> bytes | BadLine | None:
        """The next row without its newline; None at the end."""
        if self._next == len(self._rows) and not self._refill():
            return None
        line = self._rows[self._next]
        self._next += 1
        self.row += 1
        return BadLine("too_long") if isinstance(line, bytes) and len(line) > self._limit else line

    def __iter__(self) -> Iterator[bytes | BadLine]:
        while (line := self.take()) is not None:
            yield line

    def _refill(self) -> bool:
        """Fetch pieces until there is a complete row; False at the end of the shard."""
        self._rows, self._next = [], 0
        while not self._rows and not self._ended:
            try:
                piece = next(self._pieces, None)
            except DamagedShardError as damage:
                self._rows, self._ended = [BadLine(damage.kind)], True  # the row that it broke in is lost
                break
            if piece is None:
                self._ended = True
                if self._partial_bytes:
                    self._rows = [self._finish_partial()]
            else:
                self._cut(piece)
        return bool(self._rows)

    def _cut(self, piece: bytes) -> None:
        if not self.row and not self._partial_bytes:
            self.looks_like = _looks_like(piece)
        first, *others = piece.split(b"\n")
        self._extend_partial(first)
        if others:
            self._rows = [self._finish_partial(), *others[:-1]]
            self._extend_partial(others[-1])

    def _extend_partial(self, data: bytes) -> None:
        self._partial_bytes += len(data)
        if self._partial_bytes > self._limit:
            self._partial = []  # too long already: only its length goes on
        elif data:
            self._partial.append(data)

    def _finish_partial(self) -> bytes | BadLine:
        line: bytes | BadLine = BadLine("too_long") if self._partial_bytes > self._limit else b"".join(self._partial)
        self._partial, self._partial_bytes = [], 0
        return line

    def _decompressed(self) -> Iterator[bytes]:
        head = self._raw.read(CHUNK_BYTES)
        read = _with_head(head, self._raw.read)
        if head.startswith(GZIP_MAGIC):
            yield from _gunzip(read, self._raw.doubt_end)
        elif _ZSTD_MAGIC.match(head):
            yield from self._unzstd(read)
        elif self.shard.location.endswith((".gz", ".zst")) and not _is_text(head):
            raise DamagedShardError("corrupt")
        else:
            while data := read(CHUNK_BYTES):
                yield data

    def _unzstd(self, read: Read) -> Iterator[bytes]:
        """Any number of zstd frames. Memory grows with the text up to the window of a frame, which is 2 GiB at most."""
        import zstandard

        def frame() -> zstandard.ZstdDecompressionObj:
            return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()

        decompressor = frame()
        while (chunk := read(CHUNK_BYTES)) or (not decompressor.eof and self._raw.doubt_end()):
            for start in range(0, len(chunk), ZSTD_FEED_BYTES):
                data = chunk[start : start + ZSTD_FEED_BYTES]
                while data:
                    if decompressor.eof:
                        decompressor = frame()
                    try:
                        piece = decompressor.decompress(data)
                    except zstandard.ZstdError as error:
                        if "not enough memory" in str(error):
                            raise SourceError(
                                f"{self.shard.name}: there is no memory for the window that it was compressed with (zstd --long); lower "
                                "data.lanes or data.workers, or compress it again without --long"
                            ) from error
                        raise DamagedShardError("corrupt") from error
                    if piece:
                        yield piece
                    data = decompressor.unused_data if decompressor.eof else b""
        if not decompressor.eof:
            raise DamagedShardError("truncated")


def _is_text(head: bytes) -> bool:
    """Whether a shard that is named like a compressed one is text all the same, a server having unpacked it."""
    body = head.removeprefix(BOM).lstrip()
    return not body or body.startswith(b"{") or _looks_like(head) is not None


def _looks_like(head: bytes) -> str | None:
    """The kind of bad line that every line of a shard is that begins so: ``html``, ``utf16``, or None for no such shard."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")):
        return "utf16"
    return "html" if head[:1024].removeprefix(BOM).lstrip().startswith(b"<") else None


def _with_head(head: bytes, rest: Read) -> Read:
    """The same reader with ``head`` put back before it, once."""
    heads = [head]
    return lambda size: heads.pop() if heads else rest(size)


def _gunzip(read: Read, doubt_end: Callable[[], bool]) -> Iterator[bytes]:
    """Any number of gzip members; zeros may follow the last one. ``doubt_end`` says whether there may be more to read after all."""
    decompressor = zlib.decompressobj(wbits=31)
    while (data := read(CHUNK_BYTES)) or (not decompressor.eof and doubt_end()):
        while data:
            if decompressor.eof:
                data = data.lstrip(b"\0")
                if not data:
                    break
                decompressor = zlib.decompressobj(wbits=31)
            piece = _zlib_piece(decompressor, data)
            if piece:
                yield piece
            data = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
    while not decompressor.eof:
        piece = _zlib_piece(decompressor, b"")
        if not piece:
            break
        yield piece
    if not decompressor.eof:
        raise DamagedShardError("truncated")


def _zlib_piece(decompressor: zlib._Decompress, data: bytes) -> bytes:
    try:
        return decompressor.decompress(data, PIECE_BYTES)
    except zlib.error as error:
        raise DamagedShardError("corrupt") from error
