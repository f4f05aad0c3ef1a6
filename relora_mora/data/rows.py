"""The interface between packing and the rows that are packed, and the limit on rows that cannot be used.

A lane knows neither the format of its shards nor the meaning of their rows. ``read.open_rows`` opens the rows of a
shard, and a function of ``encoders.py`` tokenizes rows and marks the scored tokens (``Encode``).
"""

import io
import itertools
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
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


def in_calls(rows: Iterable[Row | Skipped], most: int, characters: int) -> Iterator[list[Row | Skipped]]:
    """Batches rows for one tokenizer call each: ``most`` of them, or fewer with at least ``characters`` characters."""
    batch: list[Row | Skipped] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += 0 if isinstance(row, Skipped) else len(row)
        if len(batch) == most or size >= characters:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def share_of(rows: range, lanes: int, lane: int) -> range:
    """One of the equal ranges into which so many lanes split the rows of a file with columns."""
    return rows[-(-len(rows) * lane // lanes) : -(-len(rows) * (lane + 1) // lanes)]


class JudgedRows(ABC):
    """A lane's own rows of one file of text or records, in an order that never changes.

    A position is the number of own rows before it, so it means the same on every machine and after every restart. The
    format decides how lanes share a file: they take lines in turn, and split files with columns into equal ranges. Too
    many bad rows end the run. That depends only on the position, so a resumed run makes the same decision there.
    """

    is_empty = False  # whether the file holds no rows, neither of this lane nor of another
    _rows: Iterator[tuple[int, Content]]  # the next own rows and their numbers in the file, from 1

    def __init__(
        self,
        config: DataConfig,
        shard: Shard,
        file: io.BufferedReader,
        *,
        stride: int,
        phase: int,
        bad: int,
        note: Note,
    ) -> None:
        self.bad = bad  # bad rows so far among the own rows; saved with a position
        self._config = config
        self._limit = config.max_line_bytes
        self._shard = shard
        self._unit = shard.format.unit or config.sample_by
        self._file = file
        self._stride = stride
        self._phase = phase
        self._note = note
        self._next = 0  # the number of the next own row
        self._noted = Counter[str]()
        self._last = ""

    @property
    @abstractmethod
    def progress(self) -> float:
        """The fraction of the own rows, or of the shard, that was read, 0 to 1."""

    @abstractmethod
    def skip(self, count: int) -> bool:
        """Skips own rows without decoding them; False if the file has fewer."""

    def close(self) -> None:
        self._file.close()

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
                assert self._shard.records is not None
                rows.append(Record(row, f"{self._shard.label}, {self._unit} {number}", self._shard.records))
            else:
                rows.append(row)
        if not rows and self.is_empty:
            self._note(f"{self._shard.label} is empty; skipped")
        # a shard of nothing but bad rows, however small it is
        if not rows and self.bad == self._next > self._config.max_bad_fraction * self._next and self._stride == 1:
            raise self.fault()
        return rows

    def _count(self, number: int, skipped: Skipped) -> None:
        self.bad += 1
        reason = skipped.detail or BAD_REASONS[skipped.reason].format(column=self._shard.text_column)
        self._last = f"{self._unit} {number} {reason}"
        self._noted[skipped.reason] += 1
        if self._noted[skipped.reason] <= NOTES_PER_REASON:
            self._note(f"{self._shard.label}: {self._last}; skipped")
        if too_many(self.bad, self._next, self._config.max_bad_fraction):
            raise self.fault()

    def fault(self) -> SourceError:
        """The error of a file with too many bad rows, which names the last one."""
        last = f"; {self._last}" if self._last else ""
        if self._noted["no_text"] and not self._shard.holds_records:
            last += f" ({_OTHER_KEYS})"
        return SourceError(
            f"{self._shard.label}: {self.bad} of {self._next} {self._unit}s are bad, more than data.max_bad_fraction "
            f"({self._config.max_bad_fraction:g}){last}. Repair or drop the shard, or raise data.max_bad_fraction"
        )


def too_many(bad: int, rows: int, max_bad_fraction: float) -> bool:
    """Whether so many bad rows end a run: fewer than 1,000 rows are judged as 1,000."""
    return bad > max_bad_fraction * max(rows, FEWEST_ROWS)


def too_many_records(bad: int, seen: int, max_bad_fraction: float, last_bad: str) -> SourceError | None:
    """The error to raise if too many records cannot be used. ``last_bad`` describes the last."""
    if not too_many(bad, seen, max_bad_fraction):
        return None
    return SourceError(
        f"{bad:,} of {seen:,} records cannot be used, more than data.max_bad_fraction ({max_bad_fraction:g}); "
        f"the last one: {last_bad}. Correct the records or data.records, or raise data.max_bad_fraction"
    )


class RecordsFound:
    """Counts and judges the outcomes of rows that are encoded once each, from the beginning."""

    def __init__(self, config: DataConfig, note: Note = log.warning) -> None:
        self.note = note
        self.seen = 0
        self.left_out = Counter[str]()  # by reason
        self.examples: dict[str, str] = {}  # by reason: a description of the last such row
        self._max_bad_fraction = config.max_bad_fraction

    def add(self, row: Encoded | Skipped) -> None:
        """Raises SourceError if too many of the records so far cannot be used."""
        self.seen += 1
        if not isinstance(row, Skipped):
            return
        self.left_out[row.reason] += 1
        self.examples[row.reason] = row.detail
        if row.reason in ENCODING_REASONS:
            bad = sum(self.left_out[reason] for reason in ENCODING_REASONS)
            if bad <= NOTES_PER_REASON:
                self.note(f"{row.detail}; skipped")
            if fault := too_many_records(bad, self.seen, self._max_bad_fraction, row.detail):
                raise fault

    def __str__(self) -> str:
        return ", ".join(f"{reason}: {count:,}" for reason, count in self.left_out.most_common())

    def check_usable(self, name: str) -> None:
        """Raises SourceError if there were rows and none can be used."""
        if self.seen and self.left_out.total() == self.seen:
            [(reason, _)] = self.left_out.most_common(1)
            remedy = "raise data.sequence_length" if reason == TOO_LONG else "correct data.records"
            raise SourceError(
                f"{name}: none of {self.seen:,} records can be used ({self}); for instance {self.examples[reason]}; "
                f"{remedy}"
            )
