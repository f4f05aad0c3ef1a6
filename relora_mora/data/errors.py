"""What can go wrong with text: errors, and the reasons why a row is skipped."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from relora_mora.config.secrets import redact
from relora_mora.system.files import LOST_DISK


class SourceError(ValueError):
    """A source of text cannot be used: what was given, what is wrong with it, what to do.

    Holds no secret, because it is logged and saved.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def unreadable(place: str, error: OSError, remedy: str) -> Exception:
    """What to raise for local text that cannot be read.

    An OSError where its disk is gone and may come back, else a SourceError.
    """
    if error.errno in LOST_DISK:
        return OSError(error.errno, error.strerror, place)
    if error.errno == errno.EMFILE:  # each lane has a file of its own open
        remedy = "raise ulimit -n, or lower data.lanes"
    return SourceError(f"{place} cannot be read ({error.strerror}); {remedy}")


class WorkerError(RuntimeError):
    """A data worker was killed, or failed for another reason than the user's input."""


_NAMES = 20  # of keys, in a message
_NAME_CHARACTERS = 80

# bad rows, which may be up to data.max_bad_fraction of a shard: the reason, and how it is told of a line or row
BAD_REASONS = {
    "too_long": "longer than data.max_line_bytes",
    "raw_nul": "holds a raw NUL byte",
    "invalid_utf8": "is not UTF-8",
    "not_json": "is not JSON",
    "long_integer": "holds an integer of more digits than Python reads (4,300); write it as a string",
    "html": "is HTML, not JSON",
    "utf16": "is UTF-16, not UTF-8 (iconv -f UTF-16 -t UTF-8)",
    "columns": "is of a Parquet or Arrow file, whose name or url has to end in .parquet or .arrow",
    "not_csv": "is not CSV",
    "field_count": "has more or fewer fields than the header",
    "no_text": 'has no "{column}"',
    "text_not_string": 'has a "{column}" that is no string',
    "truncated": "is where the compressed shard breaks off",
    "corrupt": "is where the compressed shard is damaged; what follows is lost",
    "bad_record": "is no record of its kind",
    "template_failed": "is refused by the chat template",
    "no_answer": "has no answer to learn",
}
ENCODING_REASONS = ("bad_record", "template_failed", "no_answer")  # that show when a row is tokenized
# skipped and counted as well, but nothing is wrong with these; over_length: longer than a sequence, and dropped, or cut
# before its answer; cut: not skipped, but trained on without its end
HARMLESS_REASONS = ("empty_text", "null_text", "blank_line", "empty_shard", "over_length", "cut")
SKIP_REASONS = (*BAD_REASONS, *HARMLESS_REASONS)


@dataclass(frozen=True)
class Skipped:
    """Stands in the place of a row that gives no text. ``reason`` is one of ``SKIP_REASONS``.

    ``told``: what is wrong with this row, where more can be said than of every row with this reason.
    """

    reason: str
    detail: str = field(default="", compare=False)


def names_of(keys: Iterable[str]) -> str:
    """The keys of a row, to be told."""
    names = [name[:_NAME_CHARACTERS] for name in itertools.islice(keys, _NAMES + 1)]
    more = ["..."] if len(names) > _NAMES else []
    return ", ".join(names[:_NAMES] + more) or "nothing"
