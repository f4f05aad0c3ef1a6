"""Files that pyarrow reads: the columns that are used, and groups of rows that can be read separately."""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from relora_mora.config.data import DataConfig
from relora_mora.data.bad_rows import BadRowLimit
from relora_mora.data.bytes.files import open_file
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError, names_of, too_long
from relora_mora.data.lanes import plan_lanes
from relora_mora.data.shard import Record, Shard
from relora_mora.system.files import LOST_DISK

# the UTF-8 of a text, None if it is null; for shards of records, the fields
Content = bytes | None | dict[str, Any] | Skipped
_RECORDS = "; or set data.records, if rows are not plain text"


class ColumnFile:
    """Reads the text column or the record columns of a file with groups of rows.

    ``group_rows`` holds the number of rows of each group. Raises SourceError if the file is damaged or lacks the
    columns, OSError if its disk is gone (``LOST_DISK``).
    """

    head = "its footer"  # the part of the file that is read first, for messages

    def __init__(self, shard: Shard, timeout_seconds: float) -> None:
        self._shard = shard
        self._bytes = open_file(shard, timeout_seconds)
        try:
            with self._naming_damage(self.head):
                schema = self._read_schema()
                self._check(schema)
                self.group_rows = self._count_rows(schema)
        except BaseException:
            self._bytes.close()
            raise
        self._rows_before = [0, *itertools.accumulate(self.group_rows)]

    @abstractmethod
    def contents(self, group: int, first: int, stride: int) -> Iterator[tuple[int, Content]]:
        """(number in the file from 1, content) of the rows ``first``, ``first + stride``, ... of a group."""

    def close(self) -> None:
        self._bytes.close()

    @abstractmethod
    def _read_schema(self) -> Any:
        """Opens the file and returns its pyarrow.Schema."""

    @abstractmethod
    def _count_rows(self, schema: Any) -> list[int]:
        """The number of rows of each group."""

    def _check(self, schema: Any) -> None:
        import pyarrow

        check_names(self._shard, schema.names)
        self._columns = [name for name in schema.names if name in self._shard.columns]
        types = {name: schema.field(name).type for name in schema.names}
        # a dictionary type stores each value once
        kinds = {name: kind.value_type if pyarrow.types.is_dictionary(kind) else kind for name, kind in types.items()}
        for column in self._columns:
            if _is_bytes(kinds[column]):
                raise SourceError(
                    f'{self._shard.label}: the column "{column}" holds bytes ({kinds[column]}), not strings; if they '
                    f'are UTF-8, write them as strings (pyarrow: column.cast("string")), otherwise '
                    f"{_remedy(self._shard)} to another column"
                )
        if self._shard.holds_records:
            return
        [column] = self._columns
        if not (_is_string(kinds[column]) or str(kinds[column]) == "null"):  # writers use null if all values are null
            strings = ", ".join(name for name, kind in kinds.items() if _is_string(kind)) or "none"
            raise SourceError(
                f'{self._shard.label}: the column "{column}" holds {schema.field(column).type}, not strings; '
                f"{_remedy(self._shard)} to one of those that do ({strings}){_RECORDS}"
            )

    def _contents(self, batch: Any, first: int, stride: int) -> list[Content]:
        """The content of the rows ``first``, ``first + stride``, ... of a record batch."""
        if not self._shard.holds_records:
            return utf8(batch.column(0))[first::stride].to_pylist()
        columns = {name: batch.column(name) for name in self._columns}
        return [_record(self._shard, columns, at) for at in range(first, batch.num_rows, stride)]

    @contextmanager
    def _naming_damage(self, where: str) -> Iterator[None]:
        """Turns an error of pyarrow, or a name that is not UTF-8, into one that names the damaged part of the file."""
        import pyarrow

        try:
            yield
        except (SourceError, MemoryError):  # pyarrow's MemoryError is an ArrowException as well
            raise
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno in LOST_DISK:
                raise
            raise self._damaged(where, str(error)) from error

    def _damaged(self, where: str, reason: str) -> SourceError:
        return SourceError(
            f"{self._shard.label}: {where} cannot be read ({' '.join(reason.split())}); "
            f"the file is not {self._shard.format.name}, cut short or damaged: fetch or write it again"
        )


def check_names(shard: Shard, names: Sequence[str]) -> None:
    """Raises SourceError if a column that is read is missing or appears twice. The message lists the columns."""
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
    """The beginning of a remedy, to which the caller adds the name of a column."""
    setting = "records.columns" if shard.holds_records else "text_column"
    return f"set {setting} of the source {shard.source}" if shard.source else f"set data.{setting}"


def utf8(column: Any) -> Any:
    """A column of strings as their stored bytes. Nobody has checked whether these are UTF-8."""
    import pyarrow

    if isinstance(column, pyarrow.DictionaryArray):
        return utf8(column.dictionary).take(column.indices)
    values = column.cast(pyarrow.binary_view()) if pyarrow.types.is_string_view(column.type) else column
    return values.cast(pyarrow.large_binary())


def decode_text(text: bytes) -> str | Skipped:
    """The string that a text's bytes encode, or the reason why there is none."""
    if not text:
        return Skipped("empty_text")
    try:
        return text.decode()
    except UnicodeDecodeError:
        return Skipped("invalid_utf8")


def decode_plain(text: bytes) -> str | Skipped:
    """The same for text without a format of its own, in which a NUL byte is a sign of UTF-16 or of no text at all."""
    return Skipped("invalid_utf8", "holds a NUL byte, as UTF-16 does") if b"\0" in text else decode_text(text)


def _is_string(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


class GroupRows:
    """The texts or records of a lane's share of a file (see ``rows.Rows``).

    Lanes that share a file split its groups as lanes split shards. If there are at least as many groups as lanes, each
    takes every ``stride``-th group; otherwise the lanes assigned to the same group take its rows in turn. Only the
    limits of ``config`` are used.
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
        self._limit = BadRowLimit(shard, config.max_bad_fraction, note, bad, unit="row", is_shared=stride > 1)
        self._file = groups
        filled = [number for number, rows in enumerate(groups.group_rows) if rows]
        parts = plan_lanes(stride, max(1, len(filled)), whole=True)[phase].parts
        self.is_empty = not filled
        self._groups = [filled[part.shard] for part in parts] if filled else []
        self._stride = parts[0].stride
        self._phase = parts[0].phase
        self._next = 0  # the number of the next own row
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
        if not rows:
            self._limit.finish(self._next, is_empty=self.is_empty)
        return rows

    def close(self) -> None:
        self._file.close()

    def _own_rows(self, group: int) -> int:
        return len(range(self._phase, self._file.group_rows[group], self._stride))

    def _contents_from(self, start: int) -> Iterator[tuple[int, Content]]:
        """(number in the file from 1, content) of the own rows from number ``start`` on."""
        for group in self._groups:
            rows = self._own_rows(group)
            if start < rows:
                yield from self._file.contents(group, self._phase + start * self._stride, self._stride)
            start = max(0, start - rows)

    def _row(self, number: int, content: Content) -> str | Record | Skipped:
        """The text or record of the next own row, or the reason why there is none. Counts bad rows."""
        self._next += 1
        row = self._decode(number, content)
        if isinstance(row, Skipped) and row.reason in BAD_REASONS:
            self._limit.count(number, row, seen=self._next)
        return row

    def _decode(self, number: int, content: Content) -> str | Record | Skipped:
        if content is None:
            return Skipped("null_text")
        if isinstance(content, Skipped):
            return content
        row = self._shard.record(content, f"row {number}") if isinstance(content, dict) else content
        if len(row) > self._max_bytes:
            return too_long(len(row), self._max_bytes)
        return decode_text(row) if isinstance(row, bytes) else row
