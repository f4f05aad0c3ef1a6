"""Files on http(s) servers, on the hub, and in the stores of fsspec (``s3://``, ``gs://``, ``az://`` and others).

A block of a file counts only if it arrived whole and belongs to the version that was read first; otherwise it is asked
for again. This is below the decompressor, which never notices. No message contains a url, which may hold a secret.
"""

import functools
import http.client
import io
import re
import urllib.request
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import requests
import urllib3

from relora_mora.data.errors import SourceError
from relora_mora.data.network import (
    CHECK,
    TransientError,
    check_status,
    hub_remedy,
    login_headers,
    retrying,
    stall_seconds,
)
from relora_mora.data.shard import Shard, Version

CONNECT_SECONDS = 20.0
# The size of a block that is read ahead: it doubles with each block that continues the last one. The largest one is
# halved if a connection breaks, because then all of the block is lost.
FIRST_BLOCK_BYTES = 1 << 16
LARGEST_BLOCK_BYTES = 1 << 22
SMALLEST_BLOCK_BYTES = 1 << 10
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/\d+")

_BROKEN = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)  # requests' exceptions are OSErrors


def open_remote(shard: Shard, timeout_seconds: float, first_bytes: int = FIRST_BLOCK_BYTES) -> "BlockFile":
    kind = HttpFile if shard.location.startswith(("http://", "https://")) else StoreFile
    return kind(shard, timeout_seconds, first_bytes)


def version_of(shard: Shard, timeout_seconds: float) -> Version:
    """The version of a file as its server or store reports it. Raises SourceError for a file that is missing."""
    with closing(open_remote(shard, timeout_seconds, first_bytes=1)) as file:
        assert file.version is not None, "an answer has come"
        return file.version


class BlockFile(io.RawIOBase):
    """A file that is read in blocks. Raises SourceError if its source has failed for good, or if it has changed."""

    size = -1  # bytes, once it is known

    def __init__(self, shard: Shard, timeout_seconds: float, first_bytes: int) -> None:
        self._shard = shard
        self._timeout_seconds = timeout_seconds
        self.version = shard.version  # the version that is read
        self._position = 0
        self._most = self._ahead = FIRST_BLOCK_BYTES
        self._start = 0  # the position of the block
        try:
            self._block = self._load(0, first_bytes)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _ask(self, start: int, end: int) -> bytes:
        """One attempt to read a block that ends at ``end`` or before it; sets ``size``. May raise TransientError."""

    def read(self, size: int = -1) -> bytes:
        parts: list[bytes] = []
        end = self.size if size < 0 else min(self.size, self._position + size)
        while self._position < end:
            at = self._position - self._start
            if not 0 <= at < len(self._block):
                self._ahead = min(2 * self._ahead, LARGEST_BLOCK_BYTES) if at == len(self._block) else 0
                self._block = self._load(self._position, min(self.size, max(end, self._position + self._ahead)))
                self._ahead = max(self._ahead, FIRST_BLOCK_BYTES // 2)
                self._start = self._position
                at = 0
            parts.append(self._block[at : at + end - self._position])
            self._position += len(parts[-1])
        return b"".join(parts)

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
        """A block that begins at ``start`` and ends at ``end`` or before it; it is empty only if the file is."""
        remedy = hub_remedy() if self._shard.hub else CHECK
        ask = functools.partial(self._attempt, start, end)
        return retrying(ask, f"{self._shard.name} at byte {start}", self._timeout_seconds, remedy)

    def _attempt(self, start: int, end: int) -> bytes:
        block = self._ask(start, min(end, start + self._most))
        self._most = min(LARGEST_BLOCK_BYTES, 2 * self._most)
        return block

    def _check_version(self, now: Version) -> None:
        """Raises SourceError if an answer belongs to another version than earlier ones. Notes the size."""
        known = self.version or now
        if now.is_other_than(known) or (self.size >= 0 and now.size not in (None, self.size)):
            raise SourceError(
                f"{self._shard.name} changed while it was read (its ETag, date or size is different now); "
                "use data that does not change"
            )
        self.version = Version(known.etag or now.etag, known.modified or now.modified, known.size)
        self.size = self.size if now.size is None else now.size


class HttpFile(BlockFile):
    """A file on a server that answers requests for ranges."""

    def __init__(self, shard: Shard, timeout_seconds: float, first_bytes: int) -> None:
        self._session = requests.Session()
        super().__init__(shard, timeout_seconds, first_bytes)

    def close(self) -> None:
        self._session.close()
        super().close()

    def _ask(self, start: int, end: int) -> bytes:
        headers = login_headers(self._shard.name) if self._shard.hub else {}
        headers["Range"] = f"bytes={start}-{end - 1}"
        with self._send(headers) as response:
            size = self._check(response, start, end)
            try:
                block = bytes(response.raw.read(size + 1, decode_content=False))
            except _BROKEN as error:
                self._most = max(SMALLEST_BLOCK_BYTES, (end - start) // 2)
                raise TransientError(f"the body broke off ({type(error).__name__})") from error
        if len(block) != size:
            raise TransientError(f"the body has {len(block)} bytes instead of {size}")
        return block

    def _send(self, headers: Mapping[str, str]) -> Any:
        """The answer to a request after redirects. Its body is not read yet and is not decoded.

        A login is not sent to another host. Raises TransientError, and SourceError for a url that cannot be right.
        """
        stall = stall_seconds(self._timeout_seconds)
        try:
            return self._session.get(
                self._shard.location,
                headers={"Accept-Encoding": "identity", **headers},
                # without an ``auth``, requests replaces the login in the headers by one from ~/.netrc
                auth=(lambda request: request) if any(name.lower() == "authorization" for name in headers) else None,
                stream=True,
                timeout=(min(CONNECT_SECONDS, stall), stall),
            )
        except (requests.exceptions.TooManyRedirects, ValueError) as error:  # requests' errors about urls
            proxies = " and the proxies in the environment" if urllib.request.getproxies() else ""
            raise SourceError(
                f"{self._shard.name}: its url, where it redirects, or its login cannot be used "
                f"({type(error).__name__}); check them{proxies} (socks:// needs pip install requests[socks])"
            ) from error
        except _BROKEN as error:  # only the type: the message may contain the whole url
            raise TransientError(f"no connection ({type(error).__name__})") from error

    def _check(self, response: requests.Response, start: int, end: int) -> int:
        """The size of the body that follows. Raises SourceError and TransientError for an answer that is no use."""
        name = self._shard.name
        status = response.status_code
        if status != 416:  # the answer of some servers for an empty file, which has no range
            check_status(status, response.headers, name, hub=self._shard.hub)
        if status == 200 and self.size >= 0:
            raise TransientError("the server sent the whole file although it answered ranges before")
        version = _version_in(response)
        self._check_version(version)
        if status != 206:
            if version.size == 0:
                return 0
            raise SourceError(
                f"{name}: the server answers no ranges, by which files are read; download the file and give its path, "
                "or serve it with a server that does"
            )
        answered = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if answered is None:
            raise TransientError("the server does not say which range it answered")
        first, last = map(int, answered.groups())
        if first != start or last >= end:
            raise TransientError("the server answered a range that was not asked for")
        return last + 1 - first


def _version_in(response: requests.Response) -> Version:
    """The version of a file according to an answer, and its size if the answer has it."""
    # The hub redirects to its storage, which may give another ETag. The file's own ETag is in the redirect.
    linked = [answer.headers["X-Linked-Etag"] for answer in response.history if "X-Linked-Etag" in answer.headers]
    etag = linked[0] if linked else response.headers.get("ETag")
    whole = response.headers.get("Content-Range", "").rpartition("/")[2]
    size = whole if response.status_code in (206, 416) else response.headers.get("Content-Length", "")
    return Version(
        etag and etag.removeprefix("W/"),
        response.headers.get("Last-Modified"),
        int(size) if size.isdecimal() else None,
    )


# what the stores of fsspec call the ETag of a file, and its date
_ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id")
_DATES = ("LastModified", "last_modified", "updated", "mtime", "created")


class StoreFile(BlockFile):
    """A file in a store of fsspec, which finds its credentials by its own means, for instance in the environment.

    The version is compared after each block.
    """

    def __init__(self, shard: Shard, timeout_seconds: float, first_bytes: int) -> None:
        from fsspec.core import url_to_fs

        self._name = shard.name
        try:
            self._store, self._path = url_to_fs(shard.location)
        except Exception as error:  # stores raise their own types; their messages may hold the url
            raise SourceError(
                f"{self._name}: its store cannot be opened ({type(error).__name__}); check the address and the login"
            ) from error
        super().__init__(shard, timeout_seconds, first_bytes)

    def _ask(self, start: int, end: int) -> bytes:
        if self.size < 0:
            self._check_version(self._version_now())
        end = min(end, self.size)
        block = bytes(self._call(self._store.cat_file, start=start, end=end)) if start < end else b""
        self._check_version(self._version_now())
        if len(block) != end - start:
            raise TransientError(f"the block has {len(block)} bytes instead of {end - start}")
        return block

    def _version_now(self) -> Version:
        self._store.invalidate_cache()
        info = self._call(self._store.info)
        etag = next((str(info[key]) for key in _ETAGS if info.get(key)), None)
        date = next((str(info[key]) for key in _DATES if info.get(key)), None)
        return Version(etag, date, info["size"])

    def _call(self, function: Callable[..., Any], **named: Any) -> Any:
        """Raises SourceError for a file that is missing, TransientError for a fault that may pass."""
        try:
            return function(self._path, **named)
        except FileNotFoundError as error:
            raise SourceError(f"{self._name}: the store has no such file; check the address") from error
        except PermissionError as error:
            raise SourceError(f"{self._name}: access denied; check the store's login and who may read it") from error
        except Exception as error:  # as above
            raise TransientError(f"no answer ({type(error).__name__})") from error
