"""What all requests share: retries with jittered exponential back-off, waits, and the meaning of a status.

And the datasets hub: its address, its login, commits and lists of files, by huggingface_hub with these retries.
"""

import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from relora_mora.data.errors import SourceError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 30.0
STALL_SECONDS = 30.0  # the longest wait for a byte


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
    return _ask(
        repo, revision, lambda api: str(api.dataset_info(repo, revision=revision, expand=["sha"]).sha), timeout_seconds
    )


def list_files(repo: str, commit: str, timeout_seconds: float) -> list[str]:
    """The paths of all files of a dataset at a commit. Raises SourceError."""
    return _ask(
        repo, commit, lambda api: api.list_repo_files(repo, repo_type="dataset", revision=commit), timeout_seconds
    )


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


def file_url(repo: str, commit: str, path: str) -> str:
    """The address of a file of a dataset."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, path, repo_type="dataset", revision=commit, endpoint=endpoint())
