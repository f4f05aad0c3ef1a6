"""The limit on bad rows and unusable records, beyond which a run ends."""

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import BAD_REASONS, ENCODING_REASONS, Skipped, SourceError
from relora_mora.data.rows import Encoded, Rows
from relora_mora.data.shard import Record, Shard

FEWEST_ROWS = 1000  # a fraction of fewer rows says little
NOTES_PER_REASON = 3  # per shard
OTHER_KEYS = "set data.text_column to the key of the texts, or data.records if the lines are records"


def skip_reason(skipped: Skipped, shard: Shard) -> str:
    """Describes what is wrong with a bad row of a shard."""
    return skipped.detail or BAD_REASONS[skipped.reason].format(column=shard.text_column)


def too_many(bad: int, rows: int, max_bad_fraction: float) -> bool:
    """Whether so many bad rows end a run: fewer than 1,000 rows are judged as 1,000."""
    return bad > max_bad_fraction * max(rows, FEWEST_ROWS)


class JudgedRows(Rows[Any], ABC):
    """The rows of a shard of text or records, which end the run if too many of them are bad.

    A decision depends only on the position in the shard, so a resumed run makes the same decision at the same place.
    ``bad`` is the number of bad rows before the position at which reading begins. ``note`` gets the messages.
    """

    is_empty = False
    _rows: Iterator[tuple[int, str | Record | Skipped]]  # the next own rows and their numbers in the file, from 1

    def __init__(
        self,
        config: DataConfig,
        shard: Shard,
        stride: int,
        *,
        unit: str,
        bad: int,
        note: Callable[[str], object],
    ) -> None:
        self.bad = bad
        self._shard = shard
        self._stride = stride
        self._unit = unit
        self._max_bad_fraction = config.max_bad_fraction
        self._note = note
        self._next = 0  # the number of the next own row
        self._noted = Counter[str]()
        self._last = ""

    @property
    @abstractmethod
    def progress(self) -> float:
        """The fraction of the own rows, or of the shard, that was read, 0 to 1."""

    def take(self, count: int) -> list[Any]:
        rows: list[Any] = []
        for number, row in itertools.islice(self._rows, count):
            self._next += 1
            if isinstance(row, Skipped) and row.reason in BAD_REASONS:
                self._count(number, row)
            rows.append(row)
        if not rows:
            if self.is_empty:
                self._note(f"{self._shard.label} is empty; skipped")
            # a shard of nothing but bad rows, however small it is
            if self.bad == self._next > self._max_bad_fraction * self._next and self._stride == 1:
                raise self._error()
        return rows

    def _count(self, number: int, skipped: Skipped) -> None:
        self.bad += 1
        reason = skipped.reason
        self._last = f"{self._unit} {number} {skip_reason(skipped, self._shard)}"
        self._noted[reason] += 1
        if self._noted[reason] <= NOTES_PER_REASON:
            self._note(f"{self._shard.label}: {self._last}; skipped")
        if too_many(self.bad, self._next, self._max_bad_fraction):
            raise self._error()

    def _error(self) -> SourceError:
        last = f"; {self._last}" if self._last else ""
        if self._noted["no_text"] and not self._shard.holds_records:
            last += f" ({OTHER_KEYS})"
        return SourceError(
            f"{self._shard.label}: {self.bad} of {self._next} {self._unit}s are bad, more than data.max_bad_fraction "
            f"({self._max_bad_fraction:g}){last}. Repair or drop the shard, or raise data.max_bad_fraction"
        )


TOO_LONG = "over_length"


def too_many_records(bad: int, seen: int, max_bad_fraction: float, last_bad: str) -> SourceError | None:
    """The error to raise if too many records cannot be used. ``last_bad`` describes the last."""
    if not too_many(bad, seen, max_bad_fraction):
        return None
    return SourceError(
        f"{bad:,} of {seen:,} records cannot be used, more than data.max_bad_fraction ({max_bad_fraction:g}); "
        f"the last one: {last_bad}. Correct the records or data.records, or raise data.max_bad_fraction"
    )


class RecordsFound:
    """Counts the outcomes of rows that are read once each, from the beginning."""

    def __init__(self) -> None:
        self.seen = 0
        self.left_out = Counter[str]()  # by reason
        self.examples: dict[str, str] = {}  # by reason: a description of the last such row

    @property
    def bad(self) -> int:
        return sum(self.left_out[reason] for reason in ENCODING_REASONS)

    def add(self, row: Encoded | Skipped) -> None:
        self.seen += 1
        if isinstance(row, Skipped):
            self.left_out[row.reason] += 1
            self.examples[row.reason] = row.detail

    def __str__(self) -> str:
        return ", ".join(f"{reason}: {count:,}" for reason, count in self.left_out.most_common())

    def check_usable(self, name: str) -> None:
        """Raises SourceError if there were rows, none of which can be used."""
        if self.seen and self.left_out.total() == self.seen:
            [(reason, _)] = self.left_out.most_common(1)
            remedy = "raise data.sequence_length" if reason == TOO_LONG else "correct data.records"
            raise SourceError(
                f"{name}: none of {self.seen:,} records can be used ({self}); for instance {self.examples[reason]}; "
                f"{remedy}"
            )
