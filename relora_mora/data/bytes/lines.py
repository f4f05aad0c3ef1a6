"""Decompresses a shard into pieces of bounded size, and splits these into lines of limited length.

The shard's bytes, not its name, show whether it is plain, gzip or zstd. A line that is too long is skipped. Damage of a
compressed shard is an error.
"""

import re
import zlib
from collections.abc import Callable, Iterator

from relora_mora.data.bytes.files import open_file
from relora_mora.data.bytes.local import RandomAccessFile
from relora_mora.data.errors import Skipped, SourceError, too_long
from relora_mora.data.shard import COMPRESSED, Shard

CHUNK_BYTES = 1 << 16  # of the file
PIECE_BYTES = 1 << 20  # the largest output of one gzip call
ZSTD_FEED_BYTES = 1 << 10  # zstd has no limit on its output, but 1 KiB decompresses to at most 32 MiB
ZSTD_WINDOW_BYTES = 1 << 31  # the largest window that zstd writes (--long=31)
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BOM = b"\xef\xbb\xbf"
_ZSTD_HEAD = re.compile(re.escape(ZSTD_MAGIC) + rb"|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)  # a frame, or a skippable one
BREAKS_OFF = "breaks off at"

Read = Callable[[int], bytes]


class DamagedShardError(Exception):
    """The compressed stream cannot be read beyond this place. The message says why."""


def decompress(source: RandomAccessFile, shard: Shard) -> Iterator[bytes]:
    """Pieces of the text of ``shard``, whose bytes are ``source``.

    Raises DamagedShardError after the last piece that can be read.
    """
    head = source.read(CHUNK_BYTES)
    heads = [head]

    def read(size: int) -> bytes:
        return heads.pop() if heads else source.read(size)

    if head.startswith(GZIP_MAGIC):
        yield from _gunzip(read)
    elif _ZSTD_HEAD.match(head):
        yield from _unzstd(read, shard.label)
    elif shard.name.lower().endswith(COMPRESSED) and (GZIP_MAGIC.startswith(head) or ZSTD_MAGIC.startswith(head)):
        raise DamagedShardError(BREAKS_OFF)
    else:
        while data := read(CHUNK_BYTES):
            yield data


def _gunzip(read: Read) -> Iterator[bytes]:
    """Any number of gzip members; zeros may follow the last one."""
    decompressor = zlib.decompressobj(wbits=31)
    while data := read(CHUNK_BYTES):
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
        raise DamagedShardError(BREAKS_OFF)


def _zlib_piece(decompressor: "zlib._Decompress", data: bytes) -> bytes:
    try:
        return decompressor.decompress(data, PIECE_BYTES)
    except zlib.error as error:
        raise DamagedShardError(f"is damaged ({error}) before") from error


def _unzstd(read: Read, name: str) -> Iterator[bytes]:
    """Any number of zstd frames. Memory grows with the text, up to the window of a frame, which is at most 2 GiB."""
    import zstandard

    def frame() -> "zstandard.ZstdDecompressionObj":
        return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()

    decompressor = frame()
    while chunk := read(CHUNK_BYTES):
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
                            f"{name}: there is not enough memory for its compression window (zstd --long); "
                            "lower data.lanes or data.workers, or compress it again without --long"
                        ) from error
                    raise DamagedShardError(f"is damaged ({error}) before") from error
                if piece:
                    yield piece
                data = decompressor.unused_data if decompressor.eof else b""
    if not decompressor.eof:
        raise DamagedShardError(BREAKS_OFF)


class ShardLines:
    """The lines of one shard, in order. ``row`` is the number of the line that ``take`` returns next, from 0."""

    def __init__(self, shard: Shard, *, max_line_bytes: int, timeout_seconds: float) -> None:
        self.row = 0
        self._label = shard.label
        self._bytes = open_file(shard, timeout_seconds, in_order=True)
        self._pieces = decompress(self._bytes, shard)
        self._limit = max_line_bytes
        self.taken_bytes = 0  # the length of the line that was taken last
        self._lines: list[bytes | int] = []  # complete ones, or the length of a long one; those before _next were taken
        self._next = 0
        self._partial: list[bytes] = []  # the beginning of a line whose newline has not been read yet
        self._partial_bytes = 0
        self._ended = False

    @property
    def progress(self) -> float:
        """The fraction of the shard's bytes that was read, 0 to 1."""
        return self._bytes.position / max(1, self._bytes.size)

    def close(self) -> None:
        self._bytes.close()

    def begin(self, head: bytes) -> None:
        """Called with the first piece of the text, before its lines are returned."""

    def skip(self, count: int) -> bool:
        """Skips lines without decoding them; False if the shard ends first."""
        while count:
            if self._next == len(self._lines) and not self._refill():
                return False
            step = min(count, len(self._lines) - self._next)
            self._next += step
            self.row += step
            count -= step
        return True

    def take(self) -> bytes | Skipped | None:
        """The next line without its newline; None at the end. Raises SourceError if the shard is damaged here."""
        if self._next == len(self._lines) and not self._refill():
            return None
        line = self._lines[self._next]
        self._next += 1
        self.row += 1
        self.taken_bytes = line if isinstance(line, int) else len(line)
        return line if isinstance(line, bytes) and len(line) <= self._limit else too_long(self.taken_bytes, self._limit)

    def _refill(self) -> bool:
        """Reads pieces until there is a complete line; False at the end of the shard."""
        self._lines = []
        self._next = 0
        while not self._lines and not self._ended:
            try:
                piece = next(self._pieces, None)
            except DamagedShardError as damage:
                raise SourceError(
                    f"{self._label}: its compressed data {damage} byte {self._bytes.position:,}, after line "
                    f"{self.row:,} of its text; expected a complete gzip or zstd file: fetch it again, or drop it"
                ) from damage
            if piece is not None:
                self._cut(piece)
                continue
            self._ended = True
            if self._partial_bytes:
                self._lines = [self._finish_partial()]
        return bool(self._lines)

    def _cut(self, piece: bytes) -> None:
        if not self.row and not self._partial_bytes:
            self.begin(piece)
        first, *others = piece.split(b"\n")
        self._extend_partial(first)
        if others:
            self._lines = [self._finish_partial(), *others[:-1]]
            self._extend_partial(others[-1])

    def _extend_partial(self, data: bytes) -> None:
        self._partial_bytes += len(data)
        if self._partial_bytes > self._limit:
            self._partial = []  # too long already: keep only its length
        elif data:
            self._partial.append(data)

    def _finish_partial(self) -> bytes | int:
        line = self._partial_bytes if self._partial_bytes > self._limit else b"".join(self._partial)
        self._partial = []
        self._partial_bytes = 0
        return line
