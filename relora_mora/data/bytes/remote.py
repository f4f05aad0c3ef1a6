"""Reads files on http(s) servers. The bytes are those of a server without faults.

A reader knows its position in the file. Whatever happens to a connection, the next request begins at that position
(Range). This is below the decompressor, which never notices.
"""

import functools
import re
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

import requests

from relora_mora.data.bytes import hub
from relora_mora.data.bytes.local import RandomAccessFile
from relora_mora.data.bytes.retry import CHECK, RETRIES, TransientError, retrying
from relora_mora.data.bytes.transport import BROKEN, IDLE_SECONDS, check_status, send, size_of, version_of
from relora_mora.data.errors import SourceError
from relora_mora.data.shard import FileVersion, Shard

OVERLAP_BYTES = 64
SKIP_BYTES = 1 << 16
T = TypeVar("T")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class _RemoteReader:
    """Requests parts of one file. All answers must be of the same version of the file."""

    # Bytes are read in small pieces: pieces before a fault are kept, and each restarts the time limit of the source.
    piece_bytes: int

    def __init__(self, shard: Shard, timeout_seconds: float, session: requests.Session | None = None) -> None:
        self._shard = shard
        self._timeout_seconds = timeout_seconds
        self._session = session
        self._version = FileVersion(shard.name, shard.version)
        self._response: requests.Response | None = None
        self._known_size: int | None = None
        self._piece = self.piece_bytes
        self._last_read = 0.0

    @abstractmethod
    def _check(self, response: requests.Response, start: int, end: int | None) -> None:
        """Checks the version and the range of an answer. Raises SourceError and TransientError."""

    def _retrying(self, ask: Callable[[], T], position: int) -> T:
        remedy = hub.remedy() if self._shard.hub else CHECK
        return retrying(ask, f"{self._shard.name} at byte {position}", self._timeout_seconds, remedy)

    def _request(self, start: int, end: int | None = None) -> requests.Response:
        """Makes a new answer the current one: the bytes from ``start`` to ``end``, or to the end of the file."""
        self._drop()
        headers = hub.login_headers(self._shard.name) if self._shard.hub else {}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        response = send(
            "GET",
            self._shard.location,
            self._shard.name,
            headers=headers,
            timeout_seconds=self._timeout_seconds,
            session=self._session,
        )
        try:
            # an empty file answers the first request of a range with 416, too
            if response.status_code == 416 and (start or self._known_size is not None):
                raise SourceError(
                    f"{self._shard.name} changed while it was read: it has fewer than {end or start} bytes now; "
                    "use data that does not change"
                )
            check_status(response, self._shard.name, hub=self._shard.hub)
            self._check(response, start, end)
        except BaseException:
            response.close()
            raise
        self._response = response
        return response

    def _receive(self, size: int) -> bytes:
        """At most ``size`` bytes of the current answer; none at its end."""
        assert self._response is not None
        try:
            data = bytes(self._response.raw.read(size, decode_content=False))
        except BROKEN as error:
            self._drop()
            self._piece = max(1, self._piece // 2)  # if the connection breaks, the whole piece is lost
            raise TransientError(f"the body broke off ({type(error).__name__})") from error
        self._last_read = time.monotonic()
        return data

    def _drop_idle(self) -> None:
        if time.monotonic() - self._last_read > IDLE_SECONDS:
            self._drop()

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


class RemoteBytes(_RemoteReader):
    """``read(n)`` returns n bytes, fewer only at the end. Raises SourceError if the source has failed for good.

    Each new answer must overlap the bytes that were read before. The end of the file counts only if a second answer
    agrees, so a wrong Content-Length cannot cut a shard short.
    """

    piece_bytes = 1 << 13

    def __init__(self, shard: Shard, timeout_seconds: float) -> None:
        super().__init__(shard, timeout_seconds)
        self.position = 0
        self._tail = b""  # the last bytes read, which the next answer must repeat
        self._previous_end: int | None = None  # the position at which the previous answer ended
        self._finished = False

    @property
    def size(self) -> int | None:
        return self._known_size

    def close(self) -> None:
        self._drop()

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size and not self._finished:
            part = self._retrying(functools.partial(self._attempt, size), self.position)
            self._finished = not part
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _attempt(self, size: int) -> bytes:
        """Some bytes from the current position on; none at the confirmed end."""
        self._drop_idle()
        while True:
            if self._response is None:
                self._open()
            data = self._receive(min(size, self._piece))
            if data:
                if self._previous_end == self.position:
                    RETRIES.retries += 1  # the previous answer was cut short here, and this one is a retry
                self._piece = self.piece_bytes
                self.position += len(data)
                self._tail = (self._tail + data)[-OVERLAP_BYTES:]
                return data
            self._drop()
            if self._known_size is not None and self.position < self._known_size:
                raise TransientError(f"the body ended {self._known_size - self.position} bytes early")
            if self._previous_end == self.position:
                return b""
            self._previous_end = self.position

    def _open(self) -> None:
        """Makes a new answer the current one and reads it up to the current position."""
        response = self._request(self.position - len(self._tail))
        # a server that ignores Range sends the file from its beginning
        missing = self.position if response.status_code == 200 else len(self._tail)
        repeated = b""
        try:
            while missing:
                piece = self._receive(min(missing, SKIP_BYTES))
                if not piece:
                    raise TransientError("the answer is shorter than what was read before")
                missing -= len(piece)
                repeated = (repeated + piece)[-OVERLAP_BYTES:]
            if repeated != self._tail:
                raise TransientError("the answer differs from what was read before")
        except TransientError:
            self._drop()
            raise

    def _check(self, response: requests.Response, start: int, end: int | None) -> None:
        self._version.check(version_of(response))
        if response.status_code == 206:
            answered = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if answered is None or int(answered[1]) != start:
                raise TransientError("the server answered a range that was not asked for")
        # If two answers disagree on the size, the newest counts. The end is confirmed by one more answer.
        self._known_size = size_of(response)


class RemoteFile(_RemoteReader, RandomAccessFile):
    """A file with random access, read by requests of ranges.

    Each answer must hold the requested range, and the file must keep its length. Raises SourceError if the source has
    failed for good, does not answer ranges, or has changed.
    """

    piece_bytes = 1 << 16

    def __init__(self, shard: Shard, timeout_seconds: float) -> None:
        session = requests.Session()
        _RemoteReader.__init__(self, shard, timeout_seconds, session)
        self._connections = session
        self._next = 0  # the byte that the response returns next
        self._end = 0  # the end of the response's range, exclusive
        self._window = range(0)  # the bytes that are expected to be read in one go
        try:
            RandomAccessFile.__init__(self, self._retrying(self._ask_size, 0))
        except BaseException:
            session.close()
            raise

    def read_at(self, position: int, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            part = self._retrying(functools.partial(self._attempt, position, size), position)
            parts.append(part)
            position += len(part)
            size -= len(part)
        return b"".join(parts)

    def will_read(self, start: int, end: int) -> None:
        self._window = range(start, end)

    def close(self) -> None:
        self._drop()
        self._connections.close()
        super().close()

    def _ask_size(self) -> int:
        self._request(0, 1)
        assert self._known_size is not None
        return self._known_size

    def _attempt(self, position: int, size: int) -> bytes:
        """Some of the ``size`` bytes from ``position`` on, at least one."""
        self._drop_idle()
        if self._response is None or self._next != position:
            inside = position in self._window
            self._request(position, max(position + size, self._window.stop) if inside else position + size)
        data = self._receive(min(size, self._piece, self._end - position))
        if not data:
            self._drop()
            raise TransientError("the body ended early")
        self._piece = self.piece_bytes
        self._next += len(data)
        if self._next == self._end:
            self._drop()  # a response that was read to its end leaves the connection to the next request
        return data

    def _check(self, response: requests.Response, start: int, end: int | None) -> None:
        if response.status_code != 206:
            if self._known_size is not None:
                raise TransientError("the server sent the whole file although it answered ranges before")
            raise SourceError(
                f"{self._shard.name}: the server answers no ranges, without which {self._shard.format.name} cannot be "
                "read; download the file and give its path"
            )
        self._version.check(version_of(response))
        answered = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if answered is None or answered[3] == "*":
            raise TransientError("the server does not say which range it answered")
        first, last, size = map(int, answered.groups())
        if first != start or (end is not None and last >= end):
            raise TransientError("the server answered a range that was not asked for")
        if self._known_size not in (None, size):
            raise TransientError(f"the size of the file is {size} bytes now and was {self._known_size} before")
        self._known_size = size
        self._next = start
        self._end = last + 1
