"""Retries with jittered exponential back-off. Retry-After is honored, and a source is given up after a set time."""

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import tenacity

from relora_mora.data.errors import SourceError

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 30.0
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


def retry_after_seconds(headers: Mapping[str, str]) -> float:
    """The Retry-After header, which holds seconds or a date; 0 if it is missing or cannot be read."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def retrying(
    ask: Callable[[], T],
    what: str,
    timeout_seconds: float,
    remedy: str = CHECK,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Calls ``ask()`` until it raises no TransientError, and raises SourceError after ``timeout_seconds`` of them."""
    jitter = random.Random()  # a separate generator, so that a retry does not change the state of the process's own

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        bound = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(16, state.attempt_number))
        asked = error.retry_after_seconds if isinstance(error, TransientError) else 0.0
        remaining = timeout_seconds - (state.seconds_since_start or 0.0)
        return max(0.0, min(max(jitter.uniform(bound / 4, bound), asked), remaining))

    def note(state: tenacity.RetryCallState) -> None:
        RETRIES.retries += 1
        log.info("%s: %s; retrying in %.1f s", what, state.outcome and state.outcome.exception(), state.upcoming_sleep)

    retry = tenacity.Retrying(
        sleep=sleep,
        wait=wait,
        stop=tenacity.stop_after_delay(timeout_seconds),
        retry=tenacity.retry_if_exception_type(TransientError),
        before_sleep=note,
    )
    try:
        return retry(ask)
    except tenacity.RetryError as error:
        last = error.last_attempt
        raise SourceError(
            f"{what}: gave up after {timeout_seconds:g} s and {last.attempt_number} attempts "
            f"(the last one: {last.exception()}); {remedy}, or raise data.timeout_seconds"
        ) from None
