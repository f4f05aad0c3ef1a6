"""Files that pyarrow reads, Parquet and Arrow: only the columns that are used, from any row on.

Lanes that share a file split its rows into equal ranges. The rows of a file are in groups. Parquet's footer locates its
row groups, so a position is found without reading those before it. Arrow's record batches are mapped into memory, so of
a batch that is not compressed only the columns that are used are read. When an Arrow file is opened, all batches are
passed once to count their rows, for which compressed ones are decompressed; those of a compressed stream stay so.
"""

import itertools
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import Skipped, SourceError, too_long
from relora_mora.data.files import open_file
from relora_mora.data.rows import Content, JudgedRows, share_of
from relora_mora.data.shard import ARROW, Shard, check_names
from relora_mora.system.files import LOST_DISK

READ_BYTES = 1 << 20  # stored bytes of a column chunk per read
BATCH_BYTES = 1 << 22  # bytes of text per batch, estimated from the footer
BATCH_ROWS = 1024  # rows that are Python objects at the same time
FILE_MAGIC, END_OF_STREAM = ARROW.endings


class RangeRows(JudgedRows):
    """The texts or records of one of ``stride`` equal ranges of the rows of a file.

    Raises SourceError if the file is damaged or lacks the columns, OSError if its disk is gone (``LOST_DISK``).
    """

    head = "its footer"  # the part of the file that is read first, for messages
    group = "row group"

    def __init__(self, config: DataConfig, shard: Shard, stride: int, phase: int, **judging: Any) -> None:
        super().__init__(config, shard, stride, "row", **judging)
        self._limit = config.max_line_bytes
        self._bytes = open_file(shard, config.timeout_seconds)
        try:
            with self._naming_damage(self.head):
                self._check(self._open())
                sizes = self._group_sizes()
        except BaseException:
            self.close()
            raise
        self._starts = [0, *itertools.accumulate(sizes)]
        self._range = share_of(range(self._starts[-1]), stride, phase)
        self.is_empty = not self._starts[-1]
        self._rows = self._numbered()

    @property
    def progress(self) -> float:
        return self._next / max(1, len(self._range))

    def skip(self, count: int) -> bool:
        self._next += count
        self._rows = self._numbered()
        return self._next <= len(self._range)

    def close(self) -> None:
        self._bytes.close()

    @abstractmethod
    def _open(self) -> Any:
        """Opens the file and returns its pyarrow.Schema."""

    @abstractmethod
    def _group_sizes(self) -> list[int]:
        """The number of rows of each group."""

    @abstractmethod
    def _batches(self, group: int, first: int) -> Iterator[Any]:
        """The rows of a group from ``first`` on, in record batches of at most ``BATCH_ROWS``."""

    def _check(self, schema: Any) -> None:
        import pyarrow

        shard = self._shard
        check_names(shard, schema.names)
        self._columns = [name for name in schema.names if name in shard.columns]
        types = {name: schema.field(name).type for name in schema.names}
        # a dictionary type stores each value once
        kinds = {
            name: str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind) for name, kind in types.items()
        }
        # writers use the type null if all values are null
        held = ("binary", "large_binary", "binary_view") if shard.holds_records else (*_STRINGS, "null")
        for column in self._columns:
            if (kinds[column] in held) == shard.holds_records:
                strings = ", ".join(name for name, kind in kinds.items() if kind in _STRINGS) or "none"
                raise SourceError(
                    f'{shard.label}: the column "{column}" holds {types[column]}, not strings; write it as strings '
                    f'(pyarrow: column.cast("string")), or {shard.column_remedy(f"those that do ({strings})")}'
                )

    def _numbered(self) -> Iterator[tuple[int, Content]]:
        """The own rows from ``_next`` on, with their numbers in the file from 1."""
        at = self._range.start + self._next
        while at < self._range.stop:
            group = bisect_right(self._starts, at) - 1
            stop = min(self._range.stop, self._starts[group + 1])
            batches = self._batches(group, at - self._starts[group])
            while at < stop:
                with self._naming_damage(f"{self.group} {group + 1}, from row {at + 1} on,"):
                    batch = next(batches, None)
                    rows = [] if batch is None else self._contents(batch.slice(0, stop - at))
                if batch is None:
                    raise self._damaged(f"{self.group} {group + 1}", f"its rows end before row {at + 1}")
                for row in rows:
                    at += 1
                    yield at, self._row(row)

    def _contents(self, batch: Any) -> list[Any]:
        """A text or the columns of each row, or the reason why it has none."""
        import pyarrow

        values = pyarrow.StructArray.from_arrays(batch.columns, batch.schema.names)
        if not self._shard.holds_records:
            values = batch.column(0)
        try:
            return values.to_pylist()
        except UnicodeDecodeError:
            return [self._content(value) for value in values]

    @staticmethod
    def _content(value: Any) -> Any:
        try:
            return value.as_py()
        except UnicodeDecodeError:
            return Skipped("invalid_utf8")

    def _row(self, content: Any) -> Content:
        if isinstance(content, dict):
            content = self._shard.content_in(content)
        if isinstance(content, Skipped):
            return content
        if not content:
            return Skipped("null_text" if content is None else "empty_text")
        text = content if isinstance(content, str) else str(content)
        size = len(text.encode()) if self._limit < 4 * len(text) else 0  # only then the bytes have to be counted
        return too_long(size, self._limit) if size > self._limit else content

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


_STRINGS = ("string", "large_string", "string_view")


class ParquetRows(RangeRows):
    """Only the column chunks that are used are read, a part at a time, since a group may be larger than memory."""

    def _open(self) -> Any:
        import pyarrow.parquet

        # no pre-buffering: a process must be able to end while a request is under way
        self._file = pyarrow.parquet.ParquetFile(
            self._bytes, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True
        )
        return self._file.schema_arrow

    def _group_sizes(self) -> list[int]:
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _batches(self, group: int, first: int) -> Iterator[Any]:
        row_group = self._file.metadata.row_group(group)
        chunks = [row_group.column(number) for number in range(row_group.num_columns)]
        # a list of messages is stored as one column for each of their keys
        inside = tuple(f"{name}." for name in self._columns)
        used = [each for each in chunks if f"{each.path_in_schema}.".startswith(inside)]
        rows = BATCH_BYTES * row_group.num_rows // max(1, sum(chunk.total_uncompressed_size for chunk in used))
        size = max(1, min(BATCH_ROWS, rows))
        for batch in self._file.iter_batches(size, row_groups=[group], columns=self._columns, use_threads=False):
            if first < batch.num_rows:
                yield batch.slice(first)
            first = max(0, first - batch.num_rows)


class ArrowRows(RangeRows):
    """A file has a footer with the positions of its batches. Those of a stream, as ``datasets`` writes it, are kept."""

    head = "its schema"
    group = "record batch"

    def _open(self) -> Any:
        import pyarrow

        self._bytes.close()  # it was compared with the start; pyarrow opens the file itself
        self._map = pyarrow.memory_map(self._shard.location)
        self._is_file = self._map.read_at(len(FILE_MAGIC), 0) == FILE_MAGIC
        size = len(END_OF_STREAM)
        if not self._is_file and self._map.read_at(size, max(0, self._map.size() - size)) != END_OF_STREAM:
            raise pyarrow.ArrowInvalid("it does not end as a stream does")  # pyarrow accepts a cut between batches
        return self._reader().schema

    def _reader(self, options: Any = None) -> Any:
        import pyarrow

        self._map.seek(0)
        return (pyarrow.ipc.open_file if self._is_file else pyarrow.ipc.open_stream)(self._map, options=options)

    def _group_sizes(self) -> list[int]:
        import pyarrow

        names = self._reader().schema.names
        fields = [names.index(name) for name in self._columns]
        reader = self._reader(pyarrow.ipc.IpcReadOptions(included_fields=fields, use_threads=False))
        batches = map(reader.get_batch, range(reader.num_record_batches)) if self._is_file else iter(reader)
        kept: list[Any] = []
        counts: list[int] = []
        while True:
            with self._naming_damage(f"{self.group} {len(counts) + 1}, from row {sum(counts) + 1} on,"):
                batch = next(batches, None)
            if batch is None:
                break
            counts.append(batch.num_rows)
            kept.append(None if self._is_file else batch)
        self._batch: Callable[[int], Any] = reader.get_batch if self._is_file else kept.__getitem__
        return counts

    def _batches(self, group: int, first: int) -> Iterator[Any]:
        batch = self._batch(group)
        batch.validate(full=True)  # pyarrow trusts its input
        for start in range(first, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)
