"""The column of strings in files that pyarrow reads, and what is said where there is none or the file is damaged."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from relora_mora.data.errors import SourceError
from relora_mora.data.local import LocalFile
from relora_mora.data.random_access import RandomAccessFile
from relora_mora.data.skipped import Skipped, names_of
from relora_mora.data.sources import Shard
from relora_mora.system.disk_errors import LOST_DISK

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
    from relora_mora.data.remote_file import RemoteFile  # here, because local text needs none of its libraries

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
