"""Errors about text, and the reasons for which a row is skipped."""

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field

from relora_mora.config.secrets import redact
from relora_mora.system.files import LOST_DISK


class SourceError(ValueError):
    """A source of text cannot be used. The message says what was given, what is wrong with it and what to do.

    Secrets are removed from the message, because it is logged and saved.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def unreadable(place: str, error: OSError, remedy: str) -> Exception:
    """The exception to raise for local text that cannot be read.

    This is an OSError if the disk is gone and may come back, and a SourceError otherwise.
    """
    if error.errno in LOST_DISK:
        return OSError(error.errno, error.strerror, place)
    if error.errno == errno.EMFILE:  # each lane keeps its own file open
        remedy = "raise ulimit -n, or lower data.lanes"
    return SourceError(f"{place} cannot be read ({error.strerror}); {remedy}")


class WorkerError(RuntimeError):
    """A data worker was killed, or failed for a reason other than the user's input."""


_LONGEST_LIST = 400  # characters of keys in a message

# reasons for bad rows, which may be up to data.max_bad_fraction of a shard, and how a message describes such a row
BAD_REASONS = {
    "too_long": "is longer than data.max_line_bytes",
    "invalid_utf8": "is not text in UTF-8",
    "not_json": "is not JSON",
    "not_csv": "is not CSV",
    "field_count": "has more or fewer fields than the header",
    "no_text": 'has no "{column}"',
    "text_not_string": 'has a "{column}" that is not a string',
    "bad_record": "is not a record of its kind",
    "template_failed": "is refused by the chat template",
    "no_answer": "has no answer to learn",
}
ENCODING_REASONS = ("bad_record", "template_failed", "no_answer")  # found only when a row is tokenized
# Rows that are skipped and counted although nothing is wrong with them. over_length: the row is longer than a sequence
# and was dropped, or nothing of its answer would fit. cut: the row is not skipped, but trained on without its end.
HARMLESS_REASONS = ("empty_text", "null_text", "blank_line", "empty_shard", "over_length", "cut")
SKIP_REASONS = (*BAD_REASONS, *HARMLESS_REASONS)


@dataclass(frozen=True)
class Skipped:
    """Takes the place of a row without usable text. ``reason`` is one of ``SKIP_REASONS``.

    ``detail`` describes what is wrong with this row, if there is more to say than the reason does.
    """

    reason: str
    detail: str = field(default="", compare=False)


def too_long(size: int, limit: int) -> Skipped:
    """Takes the place of a row of ``size`` bytes."""
    return Skipped("too_long", f"has a length of {size:,}, more than data.max_line_bytes ({limit:,})")


def names_of(keys: Iterable[str]) -> str:
    """The keys of a row as a list for a message."""
    return f"{', '.join(keys):.{_LONGEST_LIST}}" or "nothing"
