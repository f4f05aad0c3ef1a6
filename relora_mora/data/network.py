"""What all requests share: retries with jittered exponential back-off, waits, and the meaning of a status."""

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from relora_mora.data.errors import SourceError

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 30.0
STALL_SECONDS = 30.0  # the longest wait for a byte
CHECK = "check the network and the source"


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


def retrying(
    ask: Callable[[], T],
    what: str,
    timeout_seconds: float,
    remedy: str = CHECK,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Calls ``ask()`` until it raises no TransientError, and raises SourceError after ``timeout_seconds`` of them."""
    end = time.monotonic() + timeout_seconds
    attempt = 0
    while True:
        attempt += 1
        try:
            return ask()
        except TransientError as error:
            left = end - time.monotonic()
            if left <= 0:
                raise SourceError(
                    f"{what}: gave up after {timeout_seconds:g} s and {attempt} attempts (the last one: {error}); "
                    f"{remedy}, or raise data.timeout_seconds"
                ) from None
            bound = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(16, attempt))
            wait = min(left, max(_jitter.uniform(bound / 4, bound), error.retry_after_seconds))
            RETRIES.retries += 1
            log.info("%s: %s; retrying in %.1f s", what, error, wait)
        sleep(wait)


def stall_seconds(timeout_seconds: float) -> float:
    """The longest wait for a byte, if a source is given up after ``timeout_seconds``."""
    return min(STALL_SECONDS, max(1.0, timeout_seconds / 4))


def check_status(status: int, headers: Mapping[str, str], what: str, *, hub: bool) -> None:
    """Raises TransientError for a status that may pass, SourceError for any other than 200 and 206."""
    if status in (408, 425, 429) or status >= 500:
        raise TransientError(f"status {status}", retry_after_seconds(headers))
    if status in (401, 403):
        hint = "accept the dataset's terms and log in (hf auth login, or HF_TOKEN)" if hub else "check who may read it"
        raise SourceError(f"{what}: access denied (status {status}); {hint}")
    if status not in (200, 206):
        raise SourceError(f"{what}: the server answered status {status}; check the address")


def retry_after_seconds(headers: Mapping[str, str]) -> float:
    """The Retry-After header, which holds seconds or a date; 0 if it is missing or cannot be read."""
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    try:
        return Retry().parse_retry_after(headers.get("Retry-After", "0"))
    except (InvalidHeader, OverflowError):
        return 0.0
