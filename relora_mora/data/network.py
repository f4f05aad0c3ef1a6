"""Files on http(s) servers, on the hub, and in the stores of fsspec (``s3://``, ``gs://``, ``az://`` and others).

All requests have the same retries with jittered exponential back-off. A block of a file counts only if it arrived whole
and belongs to the version that was read first; otherwise it is asked for again. This is below the decompressor, which
never notices. No message contains a url, which may hold a secret.
"""

import http.client
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from relora_mora.data.errors import SourceError
from relora_mora.data.shard import Shard

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from requests import Response

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 30.0
STALL_SECONDS = 30.0  # the longest wait for a byte
CONNECT_SECONDS = 20.0
# the size of a block: it doubles with each block that continues the last one
FIRST_BLOCK_BYTES = 1 << 16
LARGEST_BLOCK_BYTES = 1 << 22
_RANGE = re.compile(r"bytes (?:(?P<start>\d+)-\d+|\*)/(?P<size>\d+)")


class TransientError(Exception):
    """A fault that may pass. ``retry_after_seconds`` is the wait that the server asked for, or 0."""

    def __init__(self, reason: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


@dataclass
class RetryCount:
    """The number of retries in this process, over all sources."""

    retries: int = 0


RETRIES = RetryCount()
T = TypeVar("T")
_jitter = random.Random()  # a separate generator, so that a retry does not change the state of the process's own


def retrying(ask: Callable[[], T], what: str, timeout_seconds: float, *, hub: bool = False) -> T:
    """Calls ``ask()`` until it raises no TransientError, and raises SourceError after ``timeout_seconds`` of them."""
    end = time.monotonic() + timeout_seconds
    longest = FIRST_WAIT_SECONDS
    while True:
        try:
            return ask()
        except TransientError as error:
            left = end - time.monotonic()
            if left <= 0:
                place = f" to {endpoint()}, name a mirror with HF_ENDPOINT" if hub else ""
                raise SourceError(
                    f"{what}: gave up after {timeout_seconds:g} s (the last fault: {error}); check the network{place}, "
                    "or raise data.timeout_seconds"
                ) from None
            longest = min(LONGEST_WAIT_SECONDS, 2 * longest)
            wait = min(left, max(_jitter.uniform(longest / 4, longest), error.retry_after_seconds))
            RETRIES.retries += 1
            log.info("%s: %s; retrying in %.1f s", what, error, wait)
        time.sleep(wait)


def stall_seconds(timeout_seconds: float) -> float:
    """The longest wait for a byte, if a source is given up after ``timeout_seconds``."""
    return min(STALL_SECONDS, max(1.0, timeout_seconds / 4))


def check_status(status: int, headers: Mapping[str, str], what: str, *, hub: bool) -> None:
    """Raises TransientError for a status that may pass, SourceError for any other than 200 and 206."""
    if status in (408, 425, 429) or status >= 500:
        wanted = headers.get("Retry-After", "")  # seconds, or a date, which servers hardly use
        raise TransientError(f"status {status}", float(wanted) if wanted.isdecimal() else 0.0)
    if status in (401, 403):
        hint = "accept the dataset's terms and log in (hf auth login, or HF_TOKEN)" if hub else "check who may read it"
        raise SourceError(f"{what}: access denied (status {status}); {hint}")
    if status not in (200, 206):
        raise SourceError(f"{what}: the server answered status {status}; check the address")


# ---- the hub ---------------------------------------------------------------------------------------------------------


def endpoint() -> str:
    """The address of the hub, or of the mirror in HF_ENDPOINT, which may be set after the imports."""
    address = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    if not address.startswith(("http://", "https://")):
        raise SourceError(f"HF_ENDPOINT: got {address!r}, expected the address of a hub such as https://huggingface.co")
    return address


def login_headers(what: str) -> dict[str, str]:
    """The headers that huggingface_hub sends with a request for ``what``, with the token if there is one.

    This may read files, and may ask the hub if the login has to be renewed. Raises TransientError, and SourceError if
    the token cannot be read or sent or if the hub is switched off.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise SourceError(f"{what}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it or give files by path")
    try:
        headers = dict(build_hf_headers())
        headers.get("authorization", "").encode("ascii")
    except Exception as error:  # the library's transport raises its own types, which differ between versions
        if not isinstance(error, UnicodeError) and getattr(error, "errno", None) is None:
            raise TransientError(f"no login to the hub ({type(error).__name__})") from error
        raise SourceError("the hub's login cannot be used; log in again (hf auth login) or fix HF_TOKEN") from None
    return headers


def ask_for_commit(repo: str, revision: str, timeout_seconds: float) -> str:
    """The current commit of ``revision`` of a dataset. Raises SourceError."""

    def request(api: "HfApi") -> str:
        return str(api.dataset_info(repo, revision=revision, expand=["sha"]).sha)

    return _ask(repo, revision, request, timeout_seconds)


def list_files(repo: str, commit: str, timeout_seconds: float) -> list[str]:
    """The paths of all files of a dataset at a commit. Raises SourceError."""

    def request(api: "HfApi") -> list[str]:
        return api.list_repo_files(repo, repo_type="dataset", revision=commit)

    return _ask(repo, commit, request, timeout_seconds)


def _ask(repo: str, revision: str, request: Callable[["HfApi"], T], timeout_seconds: float) -> T:
    """The answer to a request about a dataset."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    address = endpoint()
    what = f"hub:{repo} (revision {revision})"

    def ask() -> T:
        get_session().timeout = stall_seconds(timeout_seconds)  # without it a request may wait for an answer forever
        login = login_headers(f"hub:{repo}").get("authorization", "")
        try:
            return request(HfApi(endpoint=address, token=login.removeprefix("Bearer ") or False))
        except HfHubHTTPError as error:
            response: Any = error.response
            if response.status_code in (401, 403, 404):
                raise SourceError(
                    f"{what} is not a dataset on {address}, or your token has no access to it; "
                    "check the name or path and data.revision, or log in (hf auth login, or HF_TOKEN)"
                ) from error
            check_status(response.status_code, response.headers, f"{what}: {address}", hub=True)
            raise
        except Exception as error:  # as in login_headers
            raise TransientError(f"no answer ({type(error).__name__})") from error

    return retrying(ask, what, timeout_seconds, hub=True)


def hub_shard(repo: str, commit: str, path: str) -> Shard:
    """A file of a dataset at a commit."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo, path, repo_type="dataset", revision=commit, endpoint=endpoint())
    return Shard(f"hub:{repo}@{commit}/{path}", url, hub=True)


# ---- blocks of files -------------------------------------------------------------------------------------------------

# Asks once for the bytes from a start to an end, or to the end of the file, and gets them with the size and the version
# of the file. Raises TransientError and SourceError.
Ask = Callable[[int, int], tuple[bytes, int, str]]


def version_of(shard: Shard, timeout_seconds: float) -> str:
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
            block, size, version = self._ask(start, end)
            if self.version not in (None, version) or self.size not in (-1, size):
                raise SourceError(f"{self._shard.name} changed while it was read; use data that does not change")
            self.version = version
            self.size = size
            if len(block) != min(end, size) - start:
                raise TransientError(f"the block has {len(block)} bytes instead of {min(end, size) - start}")
            return block

        what = f"{self._shard.name} at byte {start}"
        return retrying(attempt, what, self._timeout_seconds, hub=self._shard.hub)


def _asking_server(shard: Shard, timeout_seconds: float) -> Ask:
    """Asks a server for ranges. A login is not sent to another host."""
    import requests  # late, because local text needs none of these libraries
    import urllib3

    session = requests.Session()
    stall = stall_seconds(timeout_seconds)

    def ask(start: int, end: int) -> tuple[bytes, int, str]:
        login = login_headers(shard.name) if shard.hub else {}
        headers = {"Accept-Encoding": "identity", **login, "Range": f"bytes={start}-{end - 1}"}
        try:
            with session.get(
                shard.location,
                headers=headers,
                # without an ``auth``, requests replaces the login in the headers by one from ~/.netrc
                auth=(lambda request: request) if "authorization" in headers else None,
                stream=True,
                timeout=(min(CONNECT_SECONDS, stall), stall),
            ) as response:
                place, size, version = _answered(response, shard)
                if place != start:
                    raise TransientError("the server answered a range that was not asked for")
                return bytes(response.raw.read(end - start, decode_content=False)), size, version
        except SourceError:  # a ValueError as well
            raise
        except (requests.exceptions.TooManyRedirects, ValueError) as error:  # requests' errors about urls
            raise SourceError(
                f"{shard.name}: its url, login or proxy cannot be used ({type(error).__name__}); check them"
            ) from error
        # requests' exceptions are OSErrors; only the type is named, because the message may contain the whole url
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise TransientError(f"the connection broke off ({type(error).__name__})") from error

    return ask


def _answered(response: "Response", shard: Shard) -> tuple[int, int, str]:
    """The beginning of the range that a server answered, and the size and the version of the file.

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
    etag = linked[0] if linked else response.headers.get("ETag", "")
    version = etag.removeprefix("W/") or f"{response.headers.get('Last-Modified')} {answered['size']}"
    return int(answered["start"] or 0), int(answered["size"]), version


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

    def described() -> tuple[int, str]:
        store.invalidate_cache()
        info = store.info(path)
        if info.get("type") == "directory":
            raise IsADirectoryError
        etag, date = (next((str(info[key]) for key in keys if info.get(key)), None) for keys in (_ETAGS, _DATES))
        return info["size"], etag or f"{date} {info['size']}"

    def ask(start: int, end: int) -> tuple[bytes, int, str]:
        try:
            if start == 0:  # later the size is known, and ``end`` is not beyond it
                end = min(end, described()[0])
            block = bytes(store.cat_file(path, start=start, end=end)) if start < end else b""
            return block, *described()  # of the file after it was read
        except (FileNotFoundError, IsADirectoryError) as error:
            raise SourceError(
                f"{shard.name}: the store has no such file; check the address, and name files, with ranges such as "
                "{000..127} and without *"
            ) from error
        except PermissionError as error:
            raise SourceError(f"{shard.name}: access denied; check the store's login and who may read it") from error
        except Exception as error:  # as above
            raise TransientError(f"no answer ({type(error).__name__})") from error

    return ask
