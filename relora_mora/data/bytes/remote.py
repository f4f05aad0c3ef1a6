"""The bytes of a file on an http(s) server, identical to those of a server without faults.

The reader knows its position. Whatever happens to a connection, it asks again from there (Range), below the
decompressor, which never notices. Each new answer must overlap what was read before; the end of the file is believed
only when a second answer agrees, so a wrong Content-Length cannot cut a shard short.
"""

from __future__ import annotations

import functools
import re
import time

import requests

from relora_mora.data.bytes import hub
from relora_mora.data.bytes.retry import CHECK, RETRIES, TransientError, retrying
from relora_mora.data.bytes.transport import BROKEN, IDLE_SECONDS, check_status, send, size_of, version_of
from relora_mora.data.errors import SourceError
from relora_mora.data.shard import FileVersion, Shard

OVERLAP_BYTES = 64
PIECE_BYTES = 1 << 13

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class RemoteBytes:
    """``read(n)`` gives n bytes, fewer only at the end. Raises SourceError when the source has failed for good."""

    def __init__(self, shard: Shard, timeout_seconds: float) -> None:
        self.shard = shard
        self.timeout_seconds = timeout_seconds
        self.position = 0
        self._tail = b""  # the last bytes read, which the next answer must repeat
        self._response: requests.Response | None = None
        self._version = FileVersion(shard.name, shard.version)
        self._size: int | None = None
        self._end: int | None = None  # where the answer before ended
        self._finished = False
        self._last_read = 0.0
        self._piece = PIECE_BYTES

    @property
    def size(self) -> int | None:
        return self._size

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        missing = 0 if self._finished else size
        while missing:
            # small pieces: what came before a fault counts, and the clock of a failing source starts anew with each
            ask = functools.partial(self._attempt, missing)
            remedy = hub.remedy() if self.shard.hub else CHECK
            part = retrying(ask, f"{self.shard.name} at byte {self.position}", self.timeout_seconds, remedy)
            if not part:
                self._finished = True
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _attempt(self, size: int) -> bytes:
        """Some bytes from the current position on; none at the confirmed end."""
        if self._response is not None and time.monotonic() - self._last_read > IDLE_SECONDS:
            self.close()
        while True:
            if self._response is None:
                self._open()
            data = self._receive(min(size, self._piece))
            self._last_read = time.monotonic()
            if data:
                if self._end == self.position:
                    RETRIES.retries += 1  # the answer before ended here: it was cut short, and this is the second try
                self._piece = PIECE_BYTES
                self.position += len(data)
                self._tail = (self._tail + data)[-OVERLAP_BYTES:]
                return data
            self.close()
            if self._size is not None and self.position < self._size:
                raise TransientError(f"the body ended {self._size - self.position} bytes early")
            if self._end == self.position:
                return b""
            self._end = self.position

    def _receive(self, size: int) -> bytes:
        assert self._response is not None
        try:
            return bytes(self._response.raw.read(size, decode_content=False))
        except BROKEN as error:
            self.close()
            self._piece = max(1, self._piece // 2)  # a piece that broke off is lost as a whole
            raise TransientError(f"the body broke off ({type(error).__name__})") from error

    def _open(self) -> None:
        """A new answer whose next byte is the one at the current position."""
        start = self.position - len(self._tail)
        response = self._request(start)
        self._response = response
        try:
            if response.status_code == 200:
                self._skip(start)
            repeated = b""
            while len(repeated) < len(self._tail):
                piece = self._receive(len(self._tail) - len(repeated))
                if not piece:
                    raise TransientError("the answer is shorter than what was read before")
                repeated += piece
            if repeated != self._tail:
                raise TransientError("the answer differs from what was read before")
        except TransientError:
            self.close()
            raise

    def _skip(self, size: int) -> None:
        # the server ignores Range: read over what we have
        while size:
            piece = self._receive(min(size, 1 << 16))
            if not piece:
                raise TransientError("the answer is shorter than what was read before")
            size -= len(piece)

    def _request(self, start: int) -> requests.Response:
        headers = hub.login_headers(self.shard.name) if self.shard.hub else {}
        if start:
            headers["Range"] = f"bytes={start}-"
        response = send(
            "GET", self.shard.location, self.shard.name, headers=headers, timeout_seconds=self.timeout_seconds
        )
        try:
            self._check(response, start)
        except (SourceError, TransientError):
            response.close()
            raise
        return response

    def _check(self, response: requests.Response, start: int) -> None:
        if response.status_code == 416:
            raise SourceError(
                f"{self.shard.name} became shorter than {start} bytes while it was read; "
                "start with data that does not change"
            )
        check_status(response, self.shard.name, hub=self.shard.hub)
        self._version.check(version_of(response))
        if response.status_code == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start:
                raise TransientError("the server answered another range than asked for")
        # of two sizes for the same file one is wrong: the newest counts, and the end is confirmed by one more answer
        self._size = size_of(response)
