"""Opens the bytes of a shard, and decompresses its text."""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from relora_mora.data.errors import SourceError
from relora_mora.data.local import ByteFile, LocalFile
from relora_mora.data.shard import COMPRESSED, Shard

READ_BYTES = 1 << 16  # of a file at a time
PIECE_BYTES = 1 << 18  # the largest piece of text from gzip
ZSTD_FEED_BYTES = 1 << 13  # zstd has no limit on its output, but 8 KiB decompress to at most 256 MiB
ZSTD_WINDOW_BYTES = 1 << 31  # the largest window that zstd writes (--long=31)
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_HEAD = re.compile(re.escape(ZSTD_MAGIC) + rb"|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)  # a frame, or a skippable one


def open_file(shard: Shard, timeout_seconds: float) -> ByteFile:
    """The stored bytes of a shard, on a disk, a server, the hub or in a store. Raises SourceError."""
    if not shard.is_remote:
        return LocalFile(shard)
    from relora_mora.data.remote import open_remote  # late, because local text needs none of its libraries

    return open_remote(shard, timeout_seconds)


def text_pieces(file: ByteFile, shard: Shard) -> Iterator[bytes]:
    """The text of a shard of lines, in pieces. Its first bytes, not its name, show whether it is compressed.

    Raises SourceError after the last piece that can be read, if the compressed data is damaged or breaks off.
    """
    head = file.read(len(ZSTD_MAGIC))
    file.seek(0)
    try:
        if head.startswith(GZIP_MAGIC):
            yield from _decompressed(
                file, READ_BYTES, lambda: zlib.decompressobj(wbits=31), (PIECE_BYTES,), padding=b"\0"
            )
        elif _ZSTD_HEAD.match(head):
            import zstandard

            zstd = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
            yield from _decompressed(file, ZSTD_FEED_BYTES, zstd.decompressobj)
        elif shard.name.lower().endswith(COMPRESSED) and (GZIP_MAGIC.startswith(head) or ZSTD_MAGIC.startswith(head)):
            file.seek(len(head))
            raise DamageError("breaks off at")
        else:
            yield from iter(lambda: file.read(READ_BYTES), b"")
    except DamageError as damage:
        raise SourceError(
            f"{shard.label}: its compressed data {damage} byte {file.tell():,}; "
            "expected a complete gzip or zstd file: fetch it again, or drop it"
        ) from damage


class DamageError(Exception):
    """Compressed data cannot be read beyond this place. The message says why."""


def _decompressed(
    file: ByteFile, feed_bytes: int, new_frame: Callable[[], Any], limit: tuple[int, ...] = (), padding: bytes = b""
) -> Iterator[bytes]:
    """The text of any number of gzip members or zstd frames. Only zlib takes a ``limit`` on the size of a piece.

    Memory for zstd grows with the text, up to the window of a frame, which is at most 2 GiB. zstandard's own reader
    takes a file that breaks off for a whole one.
    """
    frame = new_frame()
    data = b""
    while True:
        data = data or file.read(feed_bytes)
        at_end = not data
        if frame.eof:
            data = data.lstrip(padding)
            if data:
                frame = new_frame()
            elif at_end:
                return
            else:
                continue
        try:
            piece = frame.decompress(data, *limit)
        except Exception as error:  # zlib.error or zstandard.ZstdError
            raise DamageError(f"is damaged ({error}) before") from error
        if piece:
            yield piece
        elif at_end:
            raise DamageError("breaks off at")
        data = frame.unused_data if frame.eof else getattr(frame, "unconsumed_tail", b"")
