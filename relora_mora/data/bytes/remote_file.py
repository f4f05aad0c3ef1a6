"""A file on an http(s) server, read here and there: the bytes of a server without faults, by requests of ranges.

Each answer must be the range asked for, of a file of the same length and version as before. A connection that breaks
off loses nothing: the next request begins at the byte where it broke.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import TypeVar

import requests

from relora_mora.data.bytes import hub
from relora_mora.data.bytes.local import RandomAccessFile
from relora_mora.data.bytes.retry import CHECK, TransientError, retrying
from relora_mora.data.bytes.transport import BROKEN, IDLE_SECONDS, check_status, send, version_of
from relora_mora.data.errors import SourceError
from relora_mora.data.shard import FileVersion, Shard

PIECE_BYTES = 1 << 16
T = TypeVar("T")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class RemoteFile(RandomAccessFile):
    """Raises SourceError when the source has failed for good, answers no ranges, or is another file than it was."""

    def __init__(self, shard: Shard, timeout_seconds: float) -> None:
        self._shard = shard
        self._timeout_seconds = timeout_seconds
        self._session = requests.Session()
        self._version = FileVersion(shard.name, shard.version)
        self._response: requests.Response | None = None
        self._next = 0  # byte that the response gives next
        self._end = 0  # ... and the one behind its last
        self._window = range(0)  # what will be read as one piece, as far as is known
        self._last_read = 0.0
        self._piece = PIECE_BYTES
        self._size: int | None = None
        try:
            super().__init__(self._retrying(self._ask_size, 0))
        except BaseException:
            self._session.close()
            raise

    def read_at(self, position: int, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            # small pieces: what came before a fault counts, and the clock of a failing source starts anew with each
            part = self._retrying(functools.partial(self._attempt, position, size), position)
            parts.append(part)
            position += len(part)
            size -= len(part)
        return b"".join(parts)

    def will_read(self, start: int, end: int) -> None:
        self._window = range(start, end)

    def close(self) -> None:
        self._drop()
        self._session.close()
        super().close()

    def _retrying(self, ask: Callable[[], T], position: int) -> T:
        remedy = hub.remedy() if self._shard.hub else CHECK
        return retrying(ask, f"{self._shard.name} at byte {position}", self._timeout_seconds, remedy)

    def _ask_size(self) -> int:
        self._request(0, 1)
        assert self._size is not None
        return self._size

    def _attempt(self, position: int, size: int) -> bytes:
        """Some of the ``size`` bytes from ``position`` on, at least one."""
        idle = time.monotonic() - self._last_read > IDLE_SECONDS
        if self._response is None or self._next != position or idle:
            inside = position in self._window
            self._request(position, max(position + size, self._window.stop) if inside else position + size)
        data = self._receive(min(size, self._piece, self._end - position))
        self._piece = PIECE_BYTES
        self._last_read = time.monotonic()
        self._next += len(data)
        if self._next == self._end:
            self._drop()  # read as a whole, so that its connection serves the next request
        return data

    def _receive(self, size: int) -> bytes:
        assert self._response is not None
        try:
            data = bytes(self._response.raw.read(size, decode_content=False))
        except BROKEN as error:
            self._drop()
            self._piece = max(1, self._piece // 2)  # a piece that broke off is lost as a whole
            raise TransientError(f"the body broke off ({type(error).__name__})") from error
        if not data:
            self._drop()
            raise TransientError("the body ended early")
        return data

    def _request(self, start: int, end: int) -> None:
        """Makes an answer the current one whose bytes are those from ``start`` on, up to ``end`` at most."""
        self._drop()
        headers = hub.login_headers(self._shard.name) if self._shard.hub else {}
        headers["Range"] = f"bytes={start}-{end - 1}"
        response = send(
            "GET",
            self._shard.location,
            self._shard.name,
            headers=headers,
            timeout_seconds=self._timeout_seconds,
            session=self._session,
        )
        try:
            self._end = self._check(response, start, end)
        except BaseException:
            response.close()
            raise
        self._response = response
        self._next = start

    def _check(self, response: requests.Response, start: int, end: int) -> int:
        """The end of the range that was answered."""
        if response.status_code == 416 and self._size is not None:
            raise SourceError(
                f"{self._shard.name} changed while it was read: it became shorter than {end} bytes; "
                "start with data that does not change"
            )
        check_status(response, self._shard.name, hub=self._shard.hub)
        if response.status_code != 206:
            if self._size is not None:
                raise TransientError("the whole file where a range was asked for, as before")
            raise SourceError(
                f"{self._shard.name}: the server answers no ranges, without which {self._shard.format.name} cannot be "
                "read; download the file and give its path"
            )
        self._version.check(version_of(response))
        answered = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if answered is None:
            raise TransientError("the server does not say which range it answered")
        first, last, size = map(int, answered.groups())
        if first != start or last >= end:
            raise TransientError("the server answered another range than asked for")
        if self._size not in (None, size):
            raise TransientError(f"a file of {size} bytes now, of {self._size} before")
        self._size = size
        return last + 1

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None
