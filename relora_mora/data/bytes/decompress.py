"""Decompresses a shard into pieces of bounded size. Its bytes, not its name, show whether it is plain, gzip or zstd."""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from relora_mora.data.errors import SourceError
from relora_mora.data.shard import Shard

CHUNK_BYTES = 1 << 16  # of the file; always whole chunks, so that a damaged shard fails at the same place every time
PIECE_BYTES = 1 << 20  # the largest output of one gzip call
ZSTD_FEED_BYTES = 1 << 10  # zstd has no limit on its output, but 1 KiB decompresses to at most 32 MiB
ZSTD_WINDOW_BYTES = 1 << 31  # the largest window that zstd writes (--long=31)
GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
_ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)  # a frame, or a skippable frame

Read = Callable[[int], bytes]


class ShardBytes(Protocol):
    """The bytes of a shard as they are stored. ``position`` is the number of bytes read so far."""

    position: int

    @property
    def size(self) -> int | None:
        """The total number of bytes; None as long as it is not known."""

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer only at the end."""

    def close(self) -> None: ...


class DamagedShardError(Exception):
    """The compressed stream ends here. ``reason`` is ``truncated`` or ``corrupt``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decompress(source: ShardBytes, shard: Shard) -> Iterator[bytes]:
    """Pieces of the text of ``shard``, whose bytes are ``source``.

    Raises DamagedShardError after the last piece that can be read.
    """
    head = source.read(CHUNK_BYTES)
    heads = [head]

    def read(size: int) -> bytes:
        return heads.pop() if heads else source.read(size)

    if head.startswith(GZIP_MAGIC):
        yield from _gunzip(read)
    elif _ZSTD_MAGIC.match(head):
        yield from _unzstd(read, shard.label)
    else:
        while data := read(CHUNK_BYTES):
            yield data


def foreign_format(head: bytes) -> str | None:
    """The reason to skip every line of a shard that begins with ``head``; None if it may hold JSON."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")):
        return "utf16"
    if head.startswith((b"PAR1\x15", b"ARROW1\0", b"\xff\xff\xff\xff")):
        return "columns"
    return "html" if head[:1024].removeprefix(BOM).lstrip().startswith(b"<") else None


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
        raise DamagedShardError("truncated")


def _zlib_piece(decompressor: "zlib._Decompress", data: bytes) -> bytes:
    try:
        return decompressor.decompress(data, PIECE_BYTES)
    except zlib.error as error:
        raise DamagedShardError("corrupt") from error


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
                    raise DamagedShardError("corrupt") from error
                if piece:
                    yield piece
                data = decompressor.unused_data if decompressor.eof else b""
    if not decompressor.eof:
        raise DamagedShardError("truncated")
