"""Parquet: one column of a file as the rows of a lane.

The footer says how many rows each row group has, so a position is found without reading what comes before its group,
and of a file only the chunks of the text's column are read.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from relora_mora.config import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.lanes import plan_lanes
from relora_mora.data.local import LocalFile
from relora_mora.data.random_access import RandomAccessFile
from relora_mora.data.skipped import BAD_REASONS, BadRowLimit, Skipped
from relora_mora.data.sources import Shard
from relora_mora.system.disk_errors import LOST_DISK

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20  # of a column chunk at once, as stored
BATCH_BYTES = 1 << 22  # of text at once, as far as the footer tells
BATCH_ROWS = 1024
_COLUMNS_NAMED = 20


class ParquetRows:
    """The texts of a lane's share of a Parquet file (see ``rows.Rows``).

    Lanes that share a file split its row groups as lanes split shards: with at least as many groups as lanes each takes
    every ``stride``-th group, with fewer the lanes that fall on the same group take its rows in turn. Each lane judges
    the bad rows of its own share, since it does not see the others. Of ``config`` the limits are used.
    """

    def __init__(
        self,
        config: DataConfig,
        shard: Shard,
        *,
        stride: int = 1,
        phase: int = 0,
        bad: int = 0,
        note: Callable[[str], None] = log.warning,
    ) -> None:
        self._max_bytes = config.max_line_bytes
        self._limit = BadRowLimit(shard, config.max_bad_fraction, note, bad, unit="row")
        self._column = TextColumn(shard, config.timeout_seconds)
        groups = [number for number, rows in enumerate(self._column.group_rows) if rows]
        share = plan_lanes(stride, max(1, len(groups)))[phase]
        self.is_empty = not groups
        self._groups = [groups[at] for at in share.shards] if groups else []
        self._stride = share.stride
        self._phase = share.phase
        self._next = 0  # of the own rows
        self._texts: Iterator[tuple[int, bytes | None]] | None = None

    @property
    def bad(self) -> int:
        return self._limit.bad

    @property
    def groups(self) -> list[int]:
        return self._column.group_rows

    @property
    def progress(self) -> float:
        return self._next / max(1, sum(map(self._own_rows, self._groups)))

    def skip(self, count: int) -> bool:
        self._next += count
        self._texts = None
        return self._next <= sum(map(self._own_rows, self._groups))

    def take(self, count: int) -> list[str | Skipped]:
        if self._texts is None:
            self._texts = self._texts_from(self._next)
        rows = [self._row(number, text) for number, text in itertools.islice(self._texts, count)]
        if not rows and (self._next or self.is_empty):
            self._limit.finish(self._next)
        return rows

    def close(self) -> None:
        self._column.close()

    def _own_rows(self, group: int) -> int:
        return len(range(self._phase, self._column.group_rows[group], self._stride))

    def _texts_from(self, start: int) -> Iterator[tuple[int, bytes | None]]:
        """Number in the file, from 1, and UTF-8 of the own rows from the one numbered ``start`` on."""
        for group in self._groups:
            rows = self._own_rows(group)
            if start < rows:
                yield from self._column.texts(group, self._phase + start * self._stride, self._stride)
            start = max(0, start - rows)

    def _row(self, number: int, text: bytes | None) -> str | Skipped:
        """The text of the next own row, or the reason why there is none; counts a bad one."""
        self._next += 1
        row = _decoded(text, self._max_bytes)
        if isinstance(row, Skipped) and row.reason in BAD_REASONS:
            self._limit.count(number, row.reason, seen=self._next)
        return row


class TextColumn:
    """The text column of a Parquet file.

    Raises SourceError for a file that is damaged or has no such column of strings, OSError where its disk is gone
    (``LOST_DISK``).
    """

    def __init__(self, shard: Shard, timeout_seconds: float) -> None:
        import pyarrow.parquet

        self._shard = shard
        self._bytes = _open(shard, timeout_seconds)
        try:
            with self._damage_named("its footer"):
                # nothing is read ahead: a process must be able to end while a request is under way
                self._file = pyarrow.parquet.ParquetFile(
                    self._bytes, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True
                )
                schema = self._file.schema_arrow
            self._check(schema)
        except BaseException:
            self._bytes.close()
            raise
        metadata = self._file.metadata
        self.group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._rows_before = [0, *itertools.accumulate(self.group_rows)]
        paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        self._number = paths.index(shard.text_column)

    def texts(self, group: int, first: int, stride: int) -> Iterator[tuple[int, bytes | None]]:
        """Number in the file, from 1, and UTF-8 of the rows ``first``, ``first + stride``, ... of a row group."""
        before = self._rows_before[group]
        batches = self._batches(group)
        behind = 0  # rows of the group in the batches so far
        while True:
            with self._damage_named(f"row group {group + 1}, from row {before + behind + 1} on,"):
                batch = next(batches, None)
                texts = [] if batch is None else _utf8(batch.column(0))[first - behind :: stride].to_pylist()
            if batch is None:
                break
            for text in texts:
                yield before + first + 1, text
                first += stride
            behind += len(batch)
        if behind != self.group_rows[group]:
            raise self._damaged(f"row group {group + 1}", f"{behind} rows where {self.group_rows[group]} should be")

    def close(self) -> None:
        self._file.close()
        self._bytes.close()

    def _batches(self, group: int) -> Iterator[Any]:
        """The column in a row group, some rows at a time, since a whole group may be larger than memory."""
        chunk = self._file.metadata.row_group(group).column(self._number)
        start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
        self._bytes.will_read(start, start + chunk.total_compressed_size)
        rows = BATCH_BYTES * self.group_rows[group] // max(1, chunk.total_uncompressed_size)
        return self._file.iter_batches(
            max(1, min(BATCH_ROWS, rows)), row_groups=[group], columns=[self._shard.text_column], use_threads=False
        )

    def _check(self, schema: Any) -> None:
        column = self._shard.text_column
        names = [field.name for field in schema]
        if names.count(column) != 1:
            more = ", ..." if len(names) > _COLUMNS_NAMED else ""
            raise SourceError(
                f'{self._shard.name} has {names.count(column) or "no"} column{"s"[: column in names]} "{column}"; '
                f"set data.text_column to one of {', '.join(names[:_COLUMNS_NAMED])}{more}"
            )
        kind = schema.field(column).type
        if not _is_string(kind):
            strings = ", ".join(field.name for field in schema if _is_string(field.type)) or "none"
            raise SourceError(
                f'{self._shard.name}: the column "{column}" holds {kind}, not strings; '
                f"set data.text_column to one of those that do ({strings})"
            )

    @contextmanager
    def _damage_named(self, where: str) -> Iterator[None]:
        """An error of pyarrow with the place of the damage in the file."""
        import pyarrow

        try:
            yield
        except SourceError:
            raise
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno in LOST_DISK:
                raise
            raise self._damaged(where, str(error)) from error

    def _damaged(self, where: str, reason: str) -> SourceError:
        return SourceError(
            f"{self._shard.name}: {where} cannot be read ({' '.join(reason.split())}); "
            "the file is no Parquet, cut short or damaged: fetch or write it again"
        )


def check_columns(shards: Sequence[Shard], timeout_seconds: float) -> None:
    """Looks at the column of one Parquet file of each folder. Raises SourceError as ``TextColumn`` does."""
    files = [shard for shard in shards if shard.is_parquet and shard.tokens is None]
    folders = {(shard.location.rpartition("/")[0], shard.text_column): shard for shard in files}
    for shard in folders.values():
        TextColumn(shard, timeout_seconds).close()


def _open(shard: Shard, timeout_seconds: float) -> RandomAccessFile:
    if not shard.is_remote:
        return LocalFile(shard)
    from relora_mora.data.remote_file import RemoteFile  # here, because local text needs none of its libraries

    return RemoteFile(shard, timeout_seconds)


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)


def _utf8(column: Any) -> Any:
    """A column of strings as the bytes that are stored: whether they are UTF-8 nobody has checked."""
    import pyarrow

    values = column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
    if pyarrow.types.is_string_view(values.type):
        values = values.cast(pyarrow.binary_view())
    return values.cast(pyarrow.large_binary())


def _decoded(text: bytes | None, max_bytes: int) -> str | Skipped:
    if text is None:
        return Skipped("null_text")
    if not text:
        return Skipped("empty_text")
    if len(text) > max_bytes:
        return Skipped("too_long")
    try:
        return text.decode()
    except UnicodeDecodeError:
        return Skipped("invalid_utf8")
