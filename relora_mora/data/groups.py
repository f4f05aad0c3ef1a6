"""Formats that store rows in groups which can be read alone: lanes that share a file split its groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from relora_mora.config import DataConfig
from relora_mora.data.bad_rows import BadRowLimit
from relora_mora.data.columns import ColumnFile, Content
from relora_mora.data.lanes import plan_lanes
from relora_mora.data.parse import decode_text
from relora_mora.data.record_format import Record
from relora_mora.data.skipped import BAD_REASONS, Skipped
from relora_mora.data.sources import Shard


class GroupRows:
    """The texts or records of a lane's share of a file (see ``rows.Rows``).

    Lanes that share a file split its groups as lanes split shards: with at least as many groups as lanes each takes
    every ``stride``-th group, with fewer the lanes that fall on the same group take its rows in turn. Each lane judges
    the bad rows of its own share, since it does not see the others. Of ``config`` the limits are used.
    """

    def __init__(
        self,
        groups: ColumnFile,
        config: DataConfig,
        shard: Shard,
        *,
        stride: int,
        phase: int,
        bad: int,
        note: Callable[[str], None],
    ) -> None:
        self._max_bytes = config.max_line_bytes
        self._shard = shard
        self._limit = BadRowLimit(shard, config.max_bad_fraction, note, bad, unit="row")
        self._is_shared = stride > 1
        self._file = groups
        filled = [number for number, rows in enumerate(groups.group_rows) if rows]
        parts = plan_lanes(stride, max(1, len(filled)), whole=True)[phase].parts
        self.is_empty = not filled
        self._groups = [filled[part.shard] for part in parts] if filled else []
        self._stride = parts[0].stride
        self._phase = parts[0].phase
        self._next = 0  # of the own rows
        self._contents: Iterator[tuple[int, Content]] | None = None

    @property
    def bad(self) -> int:
        return self._limit.bad

    @property
    def groups(self) -> list[int]:
        return list(self._file.group_rows)

    @property
    def progress(self) -> float:
        return self._next / max(1, sum(map(self._own_rows, self._groups)))

    def skip(self, count: int) -> bool:
        self._next += count
        self._contents = None
        return self._next <= sum(map(self._own_rows, self._groups))

    def take(self, count: int) -> list[str | Record | Skipped]:
        if self._contents is None:
            self._contents = self._contents_from(self._next)
        rows = [self._row(number, content) for number, content in itertools.islice(self._contents, count)]
        if not rows and (self._next or self.is_empty):
            self._limit.finish(self._next, are_all=not self._is_shared)
        return rows

    def close(self) -> None:
        self._file.close()

    def _own_rows(self, group: int) -> int:
        return len(range(self._phase, self._file.group_rows[group], self._stride))

    def _contents_from(self, start: int) -> Iterator[tuple[int, Content]]:
        """Number in the file, from 1, and content of the own rows from the one numbered ``start`` on."""
        for group in self._groups:
            rows = self._own_rows(group)
            if start < rows:
                yield from self._file.contents(group, self._phase + start * self._stride, self._stride)
            start = max(0, start - rows)

    def _row(self, number: int, content: Content) -> str | Record | Skipped:
        """The text or record of the next own row, or the reason why there is none; counts a bad one."""
        self._next += 1
        row = self._decoded(number, content)
        if isinstance(row, Skipped) and row.reason in BAD_REASONS:
            self._limit.count(number, row, seen=self._next)
        return row

    def _decoded(self, number: int, content: Content) -> str | Record | Skipped:
        if content is None:
            return Skipped("null_text")
        if isinstance(content, Skipped):
            return content
        row = self._shard.record(content, f"row {number}") if isinstance(content, dict) else content
        if len(row) > self._max_bytes:
            return Skipped("too_long")
        return decode_text(row) if isinstance(row, bytes) else row
