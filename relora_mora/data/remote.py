"""Files on http(s) servers, on the hub, and in the stores of fsspec (``s3://``, ``gs://``, ``az://`` and others).

A block of a file counts only if it arrived whole and belongs to the version that was read first; otherwise it is asked
for again. This is below the decompressor, which never notices. No message contains a url, which may hold a secret.
"""

import http.client
import io
import re
from collections.abc import Callable
from contextlib import closing
from typing import Any

import requests
import urllib3

from relora_mora.data.errors import SourceError
from relora_mora.data.network import TransientError, check_status, login_headers, retrying, stall_seconds
from relora_mora.data.shard import Shard, Version

CONNECT_SECONDS = 20.0
# the size of a block: it doubles with each block that continues the last one
FIRST_BLOCK_BYTES = 1 << 16
LARGEST_BLOCK_BYTES = 1 << 22
_RANGE = re.compile(r"bytes (?:(?P<start>\d+)-\d+|\*)/(?P<size>\d+)")
_BROKEN = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)  # requests' exceptions are OSErrors

# asks once for the bytes from a start to an end, or to the end of the file; raises TransientError and SourceError
Ask = Callable[[int, int], tuple[bytes, Version]]


def version_of(shard: Shard, timeout_seconds: float) -> Version:
    """The version of a file as its server or store reports it. Raises SourceError for a file that is missing."""
    with closing(BlockFile(shard, timeout_seconds, first_bytes=1)) as file:
        assert file.version is not None, "an answer has come"
        return file.version


class BlockFile(io.RawIOBase):
    """A file that is read in blocks. Raises SourceError if its source has failed for good, or if it has changed."""

    def __init__(self, shard: Shard, timeout_seconds: float, first_bytes: int = FIRST_BLOCK_BYTES) -> None:
        self._shard = shard
        self._timeout_seconds = timeout_seconds
        on_server = shard.location.startswith(("http://", "https://"))
        self._ask = _asking_server(shard, timeout_seconds) if on_server else _asking_store(shard)
        self.version = shard.version  # the version that is read
        self.size = -1  # bytes, once it is known
        self._position = 0
        self._start = 0  # the position of the block
        self._block = self._load(0, first_bytes)

    def readinto(self, buffer: Any) -> int:
        at = self._position - self._start
        if not 0 <= at < len(self._block) and self._position < self.size:
            ahead = min(2 * at, LARGEST_BLOCK_BYTES) if at == len(self._block) else FIRST_BLOCK_BYTES
            end = self._position + max(len(buffer), ahead)
            self._block = self._load(self._position, min(end, self.size))
            self._start = self._position
            at = 0
        part = self._block[at : at + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _load(self, start: int, end: int) -> bytes:
        def attempt() -> bytes:
            block, now = self._ask(start, end)
            self._check_version(now)
            if len(block) != min(end, self.size) - start:
                raise TransientError(f"the block has {len(block)} bytes instead of {min(end, self.size) - start}")
            return block

        what = f"{self._shard.name} at byte {start}"
        return retrying(attempt, what, self._timeout_seconds, hub=self._shard.hub)

    def _check_version(self, now: Version) -> None:
        """Raises SourceError if an answer belongs to another version than earlier ones."""
        known = self.version or now
        if now.is_other_than(known) or self.size not in (-1, now.size):
            raise SourceError(f"{self._shard.name} changed while it was read; use data that does not change")
        self.version = Version(known.etag or now.etag, known.modified or now.modified, known.size)
        assert now.size is not None, "an answer without it is not accepted"
        self.size = now.size


def _asking_server(shard: Shard, timeout_seconds: float) -> Ask:
    """Asks a server for ranges. A login is not sent to another host."""
    session = requests.Session()
    stall = stall_seconds(timeout_seconds)

    def send(headers: dict[str, str]) -> requests.Response:
        try:
            return session.get(
                shard.location,
                headers={"Accept-Encoding": "identity", **headers},
                # without an ``auth``, requests replaces the login in the headers by one from ~/.netrc
                auth=(lambda request: request) if "authorization" in headers else None,
                stream=True,
                timeout=(min(CONNECT_SECONDS, stall), stall),
            )
        except (requests.exceptions.TooManyRedirects, ValueError) as error:  # requests' errors about urls
            raise SourceError(
                f"{shard.name}: its url, login or proxy cannot be used ({type(error).__name__}); check them"
            ) from error

    def ask(start: int, end: int) -> tuple[bytes, Version]:
        login = login_headers(shard.name) if shard.hub else {}
        try:
            with send({**login, "Range": f"bytes={start}-{end - 1}"}) as response:
                place, version = _answered(response, shard)
                if place != start:
                    raise TransientError("the server answered a range that was not asked for")
                return bytes(response.raw.read(end - start, decode_content=False)), version
        except _BROKEN as error:  # only the type: the message may contain the whole url
            raise TransientError(f"the connection broke off ({type(error).__name__})") from error

    return ask


def _answered(response: requests.Response, shard: Shard) -> tuple[int, Version]:
    """The beginning of the range that a server answered, and the version of the file.

    Raises TransientError, and SourceError for an answer without a range.
    """
    status = response.status_code
    if status != 416:  # the answer of some servers for an empty file, which has no range
        check_status(status, response.headers, shard.name, hub=shard.hub)
    is_empty = status == 200 and response.headers.get("Content-Length") == "0"
    if status == 200 and not is_empty:
        raise SourceError(f"{shard.name}: the server answers no ranges; download the file and give its path")
    answered = _RANGE.fullmatch("bytes */0" if is_empty else response.headers.get("Content-Range", ""))
    if answered is None:
        raise TransientError("the server does not say which range it answered")
    # The hub redirects to its storage, which may give another ETag. The file's own ETag is in the redirect.
    linked = [answer.headers["X-Linked-Etag"] for answer in response.history if "X-Linked-Etag" in answer.headers]
    etag = linked[0] if linked else response.headers.get("ETag")
    version = Version(etag and etag.removeprefix("W/"), response.headers.get("Last-Modified"), int(answered["size"]))
    return int(answered["start"] or 0), version


# what the stores of fsspec call the ETag of a file, and its date
_ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id")
_DATES = ("LastModified", "last_modified", "updated", "mtime", "created")


def _asking_store(shard: Shard) -> Ask:
    """Asks a store of fsspec, which finds its credentials by its own means, for instance in the environment."""
    from fsspec.core import url_to_fs

    try:
        store, path = url_to_fs(shard.location)
    except Exception as error:  # stores raise their own types; their messages may hold the url
        raise SourceError(
            f"{shard.name}: its store cannot be opened ({type(error).__name__}); check url and login"
        ) from error

    def version() -> Version:
        store.invalidate_cache()
        info = store.info(path)
        etag, date = (next((str(info[key]) for key in keys if info.get(key)), None) for keys in (_ETAGS, _DATES))
        return Version(etag, date, info["size"])

    def ask(start: int, end: int) -> tuple[bytes, Version]:
        try:
            if start == 0:  # later the size is known, and ``end`` is not beyond it
                end = min(end, version().size or 0)
            block = bytes(store.cat_file(path, start=start, end=end)) if start < end else b""
            return block, version()  # of the file after it was read
        except FileNotFoundError as error:
            raise SourceError(f"{shard.name}: the store has no such file; check the address") from error
        except PermissionError as error:
            raise SourceError(f"{shard.name}: access denied; check the store's login and who may read it") from error
        except Exception as error:  # as above
            raise TransientError(f"no answer ({type(error).__name__})") from error

    return ask
