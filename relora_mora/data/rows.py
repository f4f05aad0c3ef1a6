"""The interface between packing and the rows that are packed, and the limit on rows that cannot be used.

A lane knows neither the format of its shards nor the meaning of their rows. ``read.open_rows`` opens the rows of a
shard, and ``encoders.encoder_of`` gives the function that tokenizes them and marks the scored tokens (``Encode``).
"""

import io
import itertools
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import BAD_REASONS, ENCODING_REASONS, Skipped, SourceError
from relora_mora.data.shard import Record, Shard

# The content of a row, such as a text or the messages of a conversation. len() is about its number of characters.
Row = TypeVar("Row", bound=Sized)
TokenIds = npt.NDArray[np.integer[Any]]
Ids = Sequence[int] | TokenIds
Scored = Sequence[bool] | npt.NDArray[np.bool_]
Note = Callable[[str], object]  # gets a message about skipped rows
Content = str | dict[str, Any] | Skipped  # a text, the fields of a record, or why there is none
log = logging.getLogger(__name__)

CALL_CHARACTERS = 1 << 20  # of a tokenizer call and thread; a call needs dozens of times the memory of its text
FEWEST_ROWS = 1000  # a fraction of fewer rows says little
NOTES_PER_REASON = 3  # per shard
_OTHER_KEYS = "set data.text_column to the key of the texts, or data.records if the lines are records"
TOO_LONG = "over_length"


class Encoded(NamedTuple):
    """The tokens of a row, and for each token whether predicting it counts in the loss; None if all do."""

    ids: Ids
    scored: Scored | None = None
    cut: bool = False  # the row lost its end, because it was longer than a sequence
    utf8_bytes: int | None = None  # the size of its text, if that is known and all of it is scored


# Encodes many rows at once, because a tokenizer call has a cost. The result for a row must not depend on the others.
Encode = Callable[[list[Row]], Sequence[Encoded | Skipped]]


def encoded_in_calls(
    rows: Iterable[Row | Skipped], encode: Encode[Row], most: int, characters: int
) -> Iterator[list[Encoded | Skipped]]:
    """Tokenizes rows; those that are skipped already stay in their places.

    A call of the tokenizer gets ``most`` of them, or fewer with at least ``characters`` characters.
    """
    rows = iter(rows)
    while call := _next_call(rows, most, characters):
        made = iter(encode([row for row in call if not isinstance(row, Skipped)]))
        yield [row if isinstance(row, Skipped) else next(made) for row in call]


def _next_call(rows: Iterator[Row | Skipped], most: int, characters: int) -> list[Row | Skipped]:
    call: list[Row | Skipped] = []
    size = 0
    for row in rows:
        call.append(row)
        size += 0 if isinstance(row, Skipped) else len(row)
        if len(call) == most or size >= characters:
            break
    return call


def share_of(rows: range, lanes: int, lane: int) -> range:
    """One of the equal ranges into which so many lanes split the rows of a file with columns."""
    return rows[-(-len(rows) * lane // lanes) : -(-len(rows) * (lane + 1) // lanes)]


@dataclass
class JudgedRows(ABC):
    """A lane's own rows of one file of text, records or tokens, in an order that never changes.

    A position is the number of own rows before it, so it means the same on every machine and after every restart. The
    format decides how lanes share a file: they take lines in turn, and split files with columns into equal ranges. Too
    many bad rows end the run. That depends only on the position, so a resumed run makes the same decision there.
    """

    config: DataConfig
    shard: Shard
    file: io.BufferedReader
    stride: int
    phase: int
    bad: int  # bad rows so far among the own rows; saved with a position
    note: Note
    is_empty = False  # whether the file holds no rows, neither of this lane nor of another
    _own = range(0)  # the numbers of the own rows, if the format can find a row by its number
    _next = 0  # the number of the next own row
    _last = ""  # the last bad row

    def __post_init__(self) -> None:
        self._unit = self.shard.format.unit or self.config.sample_by
        self._limit = self.config.max_line_bytes
        self._noted = Counter[str]()
        self.open()
        self._rows = self._numbered()

    @abstractmethod
    def open(self) -> None:
        """Finds the own rows. Raises SourceError for a file that cannot be read."""

    @abstractmethod
    def _numbered(self) -> Iterator[tuple[int, Any]]:
        """The own rows from ``_next`` on, with their numbers in the file from 1."""

    @property
    def progress(self) -> float:
        """The fraction of the own rows, or of the shard, that was read, 0 to 1."""
        return self._next / max(1, len(self._own))

    def skip(self, count: int) -> bool:
        """Skips own rows without decoding them; False if the file has fewer."""
        self._next += count
        self._rows = self._numbered()
        return self._next <= len(self._own)

    def close(self) -> None:
        self.file.close()

    def take(self, count: int) -> list[Any]:
        """The next ``count`` (at least 1) own rows; fewer only at the end of the file, and none after it.

        Raises SourceError if the file cannot be read or holds too many bad rows.
        """
        rows: list[Any] = []
        for number, row in itertools.islice(self._rows, count):
            self._next += 1
            if isinstance(row, Skipped) and row.reason in BAD_REASONS:
                self._count(number, row)
            if isinstance(row, dict):
                row = Record(row, f"{self.shard.label}, {self._unit} {number}")
            rows.append(row)
        if not rows and self.is_empty:
            self.note(f"{self.shard.label} is empty; skipped")
        # a shard of nothing but bad rows, however small it is
        if not rows and self.bad == self._next > self.config.max_bad_fraction * self._next and self.stride == 1:
            raise self.fault()
        return rows

    def _count(self, number: int, skipped: Skipped) -> None:
        self.bad += 1
        reason = skipped.detail or BAD_REASONS[skipped.reason].format(column=self.shard.text_column)
        self._last = f"{self._unit} {number} {reason}"
        self._noted[skipped.reason] += 1
        if self._noted[skipped.reason] <= NOTES_PER_REASON:
            self.note(f"{self.shard.label}: {self._last}; skipped")
        if too_many(self.bad, self._next, self.config.max_bad_fraction):
            raise self.fault()

    def fault(self) -> SourceError:
        """The error of a file with too many bad rows, which names the last one."""
        last = f"; {self._last}" if self._last else ""
        if self._noted["no_text"] and self.shard.records.is_text:
            last += f" ({_OTHER_KEYS})"
        return SourceError(
            f"{self.shard.label}: {self.bad} of {self._next} {self._unit}s are bad, more than data.max_bad_fraction "
            f"({self.config.max_bad_fraction:g}){last}. Repair or drop the shard, or raise data.max_bad_fraction"
        )


def too_many(bad: int, rows: int, max_bad_fraction: float) -> bool:
    """Whether so many bad rows end a run: fewer than 1,000 rows are judged as 1,000."""
    return bad > max_bad_fraction * max(rows, FEWEST_ROWS)


def judge_records(last: Skipped, skipped: Mapping[str, int], usable: int, config: DataConfig, note: Note) -> None:
    """Reports a record that cannot be used. Raises SourceError if these are too many, with the numbers so far."""
    bad = sum(skipped.get(reason, 0) for reason in ENCODING_REASONS)
    if bad <= NOTES_PER_REASON:
        note(f"{last.detail}; skipped")
    if too_many(bad, usable + bad, config.max_bad_fraction):
        raise SourceError(
            f"{bad:,} of {usable + bad:,} records cannot be used, more than data.max_bad_fraction "
            f"({config.max_bad_fraction:g}); the last one: {last.detail}. Correct the records or data.records, or "
            "raise data.max_bad_fraction"
        )


class RecordsFound:
    """Counts and judges the outcomes of rows that are encoded once each, from the beginning."""

    def __init__(self, config: DataConfig, note: Note = log.warning) -> None:
        self.note = note
        self.usable = 0
        self.left_out = Counter[str]()  # by reason
        self._config = config
        self._last: dict[str, Skipped] = {}  # by reason

    def add(self, row: Encoded | Skipped) -> None:
        """Raises SourceError if too many of the records so far cannot be used."""
        if not isinstance(row, Skipped):
            self.usable += 1
            return
        self.left_out[row.reason] += 1
        self._last[row.reason] = row
        if row.reason in ENCODING_REASONS:
            judge_records(row, self.left_out, self.usable, self._config, self.note)

    def __str__(self) -> str:
        return ", ".join(f"{reason}: {count:,}" for reason, count in self.left_out.most_common())

    def check_usable(self, name: str) -> None:
        """Raises SourceError if there were rows and none can be used."""
        if self.left_out and not self.usable:
            [(reason, _)] = self.left_out.most_common(1)
            remedy = "raise data.sequence_length" if reason == TOO_LONG else "correct data.records"
            raise SourceError(
                f"{name}: none of {self.left_out.total():,} records can be used ({self}); for instance "
                f"{self._last[reason].detail}; {remedy}"
            )
