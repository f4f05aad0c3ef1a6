"""Files that pyarrow reads: the columns that are used, and groups of rows that can be read separately."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from relora_mora.config.data import DataConfig
from relora_mora.data.bad_rows import BadRowLimit
from relora_mora.data.bytes.local import LocalFile, RandomAccessFile
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError, names_of
from relora_mora.data.formats.json_lines import decode_text
from relora_mora.data.lanes import plan_lanes
from relora_mora.data.shard import Record, Shard
from relora_mora.system.files import LOST_DISK

# UTF-8 of the text, None where there is none; where the shard holds records, their fields
Content = bytes | None | dict[str, Any] | Skipped
_RECORDS = "; or say in data.records what a row holds, if that is no text"


class ColumnFile:
    """The column of text, or those of records, of a file with groups of rows; ``group_rows`` are their numbers.

    Raises SourceError for a file that is damaged or has no such columns, OSError where its disk is gone
    (``LOST_DISK``).
    """

    head = "its footer"  # what is read first

    def __init__(self, shard: Shard, timeout_seconds: float) -> None:
        self._shard = shard
        self._bytes = _open(shard, timeout_seconds)
        try:
            with self._damage_named(self.head):
                schema = self._read_schema()
                self._check(schema)
                self.group_rows = self._count_rows(schema)
        except BaseException:
            self._bytes.close()
            raise
        self._rows_before = [0, *itertools.accumulate(self.group_rows)]

    @abstractmethod
    def contents(self, group: int, first: int, stride: int) -> Iterator[tuple[int, Content]]:
        """Number in the file, from 1, and content of the rows ``first``, ``first + stride``, ... of a group."""

    def close(self) -> None:
        self._bytes.close()

    @abstractmethod
    def _read_schema(self) -> Any:
        """Opens the file; its pyarrow.Schema."""

    @abstractmethod
    def _count_rows(self, schema: Any) -> list[int]:
        """The rows of each group."""

    def _check(self, schema: Any) -> None:
        check_names(self._shard, schema.names)
        self._columns = [name for name in schema.names if name in self._shard.columns]
        kinds = {name: _value_type(schema.field(name).type) for name in schema.names}
        for column in self._columns:
            if _is_bytes(kinds[column]):
                raise SourceError(
                    f'{self._shard.label}: the column "{column}" holds bytes ({kinds[column]}), not strings; if they '
                    f'are UTF-8, write them as strings (pyarrow: column.cast("string")), else {_remedy(self._shard)} '
                    "to another one"
                )
        if self._shard.holds_records:
            return
        [column] = self._columns
        if not (_is_string(kinds[column]) or str(kinds[column]) == "null"):  # what writers make of nothing but nulls
            strings = ", ".join(name for name, kind in kinds.items() if _is_string(kind)) or "none"
            raise SourceError(
                f'{self._shard.label}: the column "{column}" holds {schema.field(column).type}, not strings; '
                f"{_remedy(self._shard)} to one of those that do ({strings}){_RECORDS}"
            )

    def _contents(self, batch: Any, first: int, stride: int) -> list[Content]:
        """What the rows ``first``, ``first + stride``, ... of a record batch of the columns hold."""
        if not self._shard.holds_records:
            return utf8(batch.column(0))[first::stride].to_pylist()
        columns = {name: batch.column(name) for name in self._columns}
        return [_record(self._shard, columns, at) for at in range(first, batch.num_rows, stride)]

    @contextmanager
    def _damage_named(self, where: str) -> Iterator[None]:
        """An error of pyarrow, or a name that is no text, with the place of the damage in the file."""
        import pyarrow

        try:
            yield
        except (SourceError, MemoryError):  # an ArrowException, too
            raise
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno in LOST_DISK:
                raise
            raise self._damaged(where, str(error)) from error

    def _damaged(self, where: str, reason: str) -> SourceError:
        return SourceError(
            f"{self._shard.label}: {where} cannot be read ({' '.join(reason.split())}); "
            f"the file is no {self._shard.format.name}, cut short or damaged: fetch or write it again"
        )


def check_names(shard: Shard, names: Sequence[str]) -> None:
    """Raises SourceError, with the columns there are, unless that of the text, or each of a record, is one of them."""
    for column in shard.columns:
        count = list(names).count(column)
        if count > 1 or (count == 0 and column in shard.required_columns):
            raise SourceError(
                f'{shard.label} has {count or "no"} column{"s" if count else ""} "{column}"; '
                f"{_remedy(shard)} to one of {names_of(names)}{'' if shard.holds_records else _RECORDS}"
            )


def _record(shard: Shard, columns: dict[str, Any], at: int) -> dict[str, Any] | Skipped:
    assert shard.records is not None
    try:
        return shard.records.fields_of({name: column[at].as_py() for name, column in columns.items()})
    except UnicodeDecodeError:
        return Skipped("invalid_utf8")


def _remedy(shard: Shard) -> str:
    """What to change, up to the name of a column."""
    setting = "records.columns" if shard.holds_records else "text_column"
    return f"set {setting} of the source {shard.source}" if shard.source else f"set data.{setting}"


def utf8(column: Any) -> Any:
    """A column of strings as the bytes that are stored: whether they are UTF-8 nobody has checked."""
    import pyarrow

    if isinstance(column, pyarrow.DictionaryArray):
        return utf8(column.dictionary).take(column.indices)
    values = column.cast(pyarrow.binary_view()) if pyarrow.types.is_string_view(column.type) else column
    return values.cast(pyarrow.large_binary())


def _open(shard: Shard, timeout_seconds: float) -> RandomAccessFile:
    if not shard.is_remote:
        return LocalFile(shard)
    from relora_mora.data.bytes.remote_file import RemoteFile  # here, because local text needs none of its libraries

    return RemoteFile(shard, timeout_seconds)


def _value_type(kind: Any) -> Any:
    """The type of what a column holds, also where each value is stored once."""
    import pyarrow

    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _is_string(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


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
