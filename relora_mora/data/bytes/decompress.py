"""The text of a shard's bytes, in pieces of bounded size: plain, gzip or zstd, as the bytes say and not the name."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from relora_mora.data.errors import SourceError
from relora_mora.data.shard import Shard

CHUNK_BYTES = 1 << 16  # of the file; always whole chunks, so that a damaged shard fails at the same place every time
PIECE_BYTES = 1 << 20  # the most that gzip may give at once
ZSTD_FEED_BYTES = 1 << 10  # zstd has no such limit, but 1 KiB holds at most 32 MiB
ZSTD_WINDOW_BYTES = 1 << 31  # the most that zstd writes (--long=31)
GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
_ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)  # of a frame, and of one to pass over

Read = Callable[[int], bytes]


class ShardBytes(Protocol):
    """The bytes of a shard as they are stored; ``position`` of them were read."""

    position: int

    @property
    def size(self) -> int | None:
        """All of them; None as long as that is not known."""

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer only at the end."""

    def close(self) -> None: ...


class DamagedShardError(Exception):
    """The compressed stream ends here. ``reason`` is ``truncated`` or ``corrupt``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decompress(source: ShardBytes, shard: Shard) -> Iterator[bytes]:
    """Pieces of the text of ``shard``, whose bytes are ``source``. Raises DamagedShardError after what can be read."""
    head = source.read(CHUNK_BYTES)
    read = _with_head(head, source.read)
    if head.startswith(GZIP_MAGIC):
        yield from _gunzip(read)
    elif _ZSTD_MAGIC.match(head):
        yield from _unzstd(read, shard.label)
    else:
        while data := read(CHUNK_BYTES):
            yield data


def foreign_format(head: bytes) -> str | None:
    """The reason to skip every line of a shard that begins so; None where it may hold JSON."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")):
        return "utf16"
    if head.startswith((b"PAR1\x15", b"ARROW1\0", b"\xff\xff\xff\xff")):
        return "columns"
    return "html" if head[:1024].removeprefix(BOM).lstrip().startswith(b"<") else None


def _with_head(head: bytes, rest: Read) -> Read:
    """The same reader with ``head`` put back before it, once."""
    heads = [head]
    return lambda size: heads.pop() if heads else rest(size)


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


def _zlib_piece(decompressor: zlib._Decompress, data: bytes) -> bytes:
    try:
        return decompressor.decompress(data, PIECE_BYTES)
    except zlib.error as error:
        raise DamagedShardError("corrupt") from error


def _unzstd(read: Read, name: str) -> Iterator[bytes]:
    """Any number of zstd frames. Memory grows with the text up to the window of a frame, which is 2 GiB at most."""
    import zstandard

    def frame() -> zstandard.ZstdDecompressionObj:
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
                            f"{name}: there is no memory for the window that it was compressed with (zstd --long); "
                            "lower data.lanes or data.workers, or compress it again without --long"
                        ) from error
                    raise DamagedShardError("corrupt") from error
                if piece:
                    yield piece
                data = decompressor.unused_data if decompressor.eof else b""
    if not decompressor.eof:
        raise DamagedShardError("truncated")
