"""Formats that are read from the beginning of a file. Lanes that share a shard take its rows in turn."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from relora_mora.config.data import DataConfig
from relora_mora.data.bad_rows import BadRowLimit
from relora_mora.data.bytes.lines import ShardLines
from relora_mora.data.errors import BAD_REASONS, Skipped
from relora_mora.data.formats.json_lines import JsonLines
from relora_mora.data.shard import Record, Shard

Entry = TypeVar("Entry")


class FromLines(ABC, Generic[Entry]):
    """The entries of a shard, in order, which are made of its lines.

    ``row`` is the number of the entry that ``take`` returns next, from 0; ``progress`` the fraction that was read.
    """

    def __init__(self, shard: Shard, config: DataConfig) -> None:
        self.row = 0
        self._limit = config.max_line_bytes
        self._lines = ShardLines(shard, max_line_bytes=config.max_line_bytes, timeout_seconds=config.timeout_seconds)

    @property
    def progress(self) -> float:
        return self._lines.progress

    def skip(self, count: int) -> bool:
        """Skips entries without decoding them; False if the shard ends first."""
        return all(self.take() is not None for _ in range(count))

    def take(self) -> Entry | None:
        """The next entry; None at the end."""
        entry = self._next()
        self.row += entry is not None
        return entry

    def close(self) -> None:
        self._lines.close()

    @abstractmethod
    def content(self, entry: Entry) -> str | dict[str, Any] | Skipped:
        """The text, or the fields if the shard holds records, or the reason why it has neither."""

    @abstractmethod
    def _next(self) -> Entry | None:
        """The next entry, which ``take`` counts; None at the end."""


Entries = FromLines[Any] | JsonLines


class TurnRows:
    """The texts or records of the entries ``phase``, ``phase + stride``, ... of a shard (see ``rows.Rows``).

    Only the limits and ``sample_by`` of ``config`` are used.
    """

    groups = None

    def __init__(
        self,
        entries: Entries,
        config: DataConfig,
        shard: Shard,
        *,
        stride: int,
        phase: int,
        bad: int,
        note: Callable[[str], None],
    ) -> None:
        self._entries = entries
        self._stride = stride
        self._phase = phase
        self._shard = shard
        self._unit = shard.format.unit or config.sample_by
        self._limit = BadRowLimit(shard, config.max_bad_fraction, note, bad, unit=self._unit, is_shared=stride > 1)
        self._next = 0  # the number of the next own row

    @property
    def bad(self) -> int:
        return self._limit.bad

    @property
    def is_empty(self) -> bool:
        return not self._entries.row

    @property
    def progress(self) -> float:
        return self._entries.progress

    def skip(self, count: int) -> bool:
        self._next += count
        return self._entries.skip(count * self._stride)

    def take(self, count: int) -> list[str | Record | Skipped]:
        rows: list[str | Record | Skipped] = []
        while len(rows) < count and self._entries.skip(self._phase):
            entry = self._entries.take()
            if entry is None:
                break
            self._next += 1
            rows.append(self._content(entry))
            self._entries.skip(self._stride - self._phase - 1)
        if not rows:
            self._limit.finish(self._next, is_empty=self.is_empty)
        return rows

    def close(self) -> None:
        self._entries.close()

    def _content(self, entry: Any) -> str | Record | Skipped:
        """The content of the entry taken last, or the reason why there is none. Counts bad entries."""
        row = self._entries.content(entry)
        if isinstance(row, dict):
            return self._shard.record(row, f"{self._unit} {self._entries.row}")
        if isinstance(row, Skipped) and row.reason in BAD_REASONS:
            self._limit.count(self._entries.row, row, seen=self._next)
        return row
