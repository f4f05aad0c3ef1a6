"""Reads files on http(s) servers by requests of ranges. The bytes are those of a server without faults.

A block of a file counts only if it arrived whole and belongs to the version that was read first; otherwise it is asked
for again. This is below the decompressor, which never notices.
"""

import functools
import re
import time

import requests

from relora_mora.data.bytes import hub
from relora_mora.data.bytes.local import RandomAccessFile
from relora_mora.data.bytes.retry import CHECK, TransientError, retrying
from relora_mora.data.bytes.transport import BROKEN, IDLE_SECONDS, check_status, send, size_of, version_of
from relora_mora.data.errors import SourceError
from relora_mora.data.shard import FileVersion, Shard

# The size of a block that is read ahead: it doubles with each block that arrives, up to the largest, and is halved if a
# connection breaks, because then all of the block is lost.
FIRST_BLOCK_BYTES = 1 << 18
LARGEST_BLOCK_BYTES = 1 << 22
SMALLEST_BLOCK_BYTES = 1 << 10
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class RemoteFile(RandomAccessFile):
    """A file on a server. ``in_order``: it will be read from its beginning to its end.

    Raises SourceError if the source has failed for good, does not answer ranges, or has changed.
    """

    def __init__(self, shard: Shard, timeout_seconds: float, *, in_order: bool = False) -> None:
        self._session = requests.Session()
        self._shard = shard
        self._timeout_seconds = timeout_seconds
        self._version = FileVersion(shard.name, shard.version)
        self._known_size: int | None = None
        self._block_bytes = FIRST_BLOCK_BYTES
        self._last_answer = 0.0
        self._window = range(0)  # the bytes that are expected to be read in order
        try:
            self._block = self._load(0, FIRST_BLOCK_BYTES if in_order else 1)
        except BaseException:
            self._session.close()
            raise
        self._start = 0  # the position of the block
        assert self._known_size is not None
        super().__init__(self._known_size)
        if in_order:
            self._window = range(self.size)

    def read_at(self, position: int, size: int) -> bytes:
        parts: list[bytes] = []
        end = position + size
        while position < end:
            if not self._start <= position < self._start + len(self._block):
                self._block = self._load(position, max(end, self._window.stop) if position in self._window else end)
                self._start = position
            at = position - self._start
            part = self._block[at : at + end - position]
            parts.append(part)
            position += len(part)
        return b"".join(parts)

    def will_read(self, start: int, end: int) -> None:
        self._window = range(start, end)

    def close(self) -> None:
        self._session.close()
        super().close()

    def _load(self, start: int, end: int) -> bytes:
        """A block that begins at ``start`` and ends at ``end`` or before it."""
        remedy = hub.remedy() if self._shard.hub else CHECK
        ask = functools.partial(self._ask, start, end)
        return retrying(ask, f"{self._shard.name} at byte {start}", self._timeout_seconds, remedy)

    def _ask(self, start: int, end: int) -> bytes:
        """One request for a block; it is empty only if the file is."""
        end = min(end, start + self._block_bytes)
        headers = hub.login_headers(self._shard.name) if self._shard.hub else {}
        headers["Range"] = f"bytes={start}-{end - 1}"
        if time.monotonic() - self._last_answer > IDLE_SECONDS:
            self._session.close()  # it opens other connections
        with send(
            "GET",
            self._shard.location,
            self._shard.name,
            headers=headers,
            timeout_seconds=self._timeout_seconds,
            session=self._session,
        ) as response:
            size = self._check(response, start, end)
            try:
                block = bytes(response.raw.read(size + 1, decode_content=False))
            except BROKEN as error:
                self._block_bytes = max(SMALLEST_BLOCK_BYTES, (end - start) // 2)
                raise TransientError(f"the body broke off ({type(error).__name__})") from error
        if len(block) != size:
            raise TransientError(f"the body has {len(block)} bytes instead of {size}")
        self._block_bytes = min(LARGEST_BLOCK_BYTES, 2 * self._block_bytes)
        self._last_answer = time.monotonic()
        return block

    def _check(self, response: requests.Response, start: int, end: int) -> int:
        """The size of the body that follows. Raises SourceError and TransientError for an answer that is no use."""
        name = self._shard.name
        status = response.status_code
        known = self._known_size
        if status == 416 and known is not None:
            raise SourceError(
                f"{name} changed while it was read: it has fewer than {end} bytes now; use data that does not change"
            )
        is_empty = status in (200, 416) and size_of(response) == 0  # an empty file has no range
        if not is_empty:
            check_status(response, name, hub=self._shard.hub)
        self._version.check(version_of(response))
        if status != 206 and known is not None:
            raise TransientError("the server sent the whole file although it answered ranges before")
        if is_empty:
            self._known_size = 0
            return 0
        if status != 206:
            raise SourceError(
                f"{name}: the server answers no ranges, by which files are read; download the file and give its path, "
                "or serve it with a server that does"
            )
        answered = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if answered is None:
            raise TransientError("the server does not say which range it answered")
        first, last, size = map(int, answered.groups())
        if first != start or last >= end:
            raise TransientError("the server answered a range that was not asked for")
        if known not in (None, size):
            raise TransientError(f"the size of the file is {size} bytes now and was {known} before")
        self._known_size = size
        return last + 1 - first
