"""Reads the text column or the record columns of local Arrow files and streams, one record batch at a time.

pyarrow maps the file into memory, so of a batch that is not compressed only the columns that are used are read. A file
has a footer with the positions of its batches. A stream, the format that ``datasets`` writes, is read in order. When
either is opened, all batches are passed once to count their rows, for which compressed ones are decompressed.
"""

from collections.abc import Iterator
from typing import Any

from relora_mora.data.formats.columns import ColumnFile, Content
from relora_mora.data.shard import ARROW

FILE_MAGIC, END_OF_STREAM = ARROW.endings
BATCH_ROWS = 1024  # rows of a record batch that are Python objects at the same time


class ArrowColumn(ColumnFile):
    """The groups are record batches."""

    head = "its schema"

    def contents(self, group: int, first: int, stride: int) -> Iterator[tuple[int, Content]]:
        before = self._rows_before[group]
        with self._naming_damage(_place(group, before)):
            batch = self._checked(self._batch(group))
        count = batch.num_rows
        for start in range(first, count, stride * BATCH_ROWS):
            rows = range(start, min(count, start + stride * BATCH_ROWS), stride)
            contents = self._contents(batch.slice(start, rows.stop - start), 0, stride)
            for row, content in zip(rows, contents, strict=True):
                yield before + row + 1, content

    def _read_schema(self) -> Any:
        import pyarrow

        self._bytes.close()  # it was compared with the start; pyarrow opens the file itself
        self._map = pyarrow.memory_map(self._shard.location)
        self._is_file = self._map.read_at(len(FILE_MAGIC), 0) == FILE_MAGIC
        size = len(END_OF_STREAM)
        if not self._is_file and self._map.read_at(size, max(0, self._map.size() - size)) != END_OF_STREAM:
            raise pyarrow.ArrowInvalid("it does not end as a stream does")  # pyarrow accepts a cut between batches
        self._open()
        return self._reader.schema

    def _count_rows(self, schema: Any) -> list[int]:
        import pyarrow

        counts: list[int] = []
        before = 0
        while True:
            with self._naming_damage(_place(len(counts), before)):
                batch = self._batch(len(counts))
            if batch is None:
                break
            counts.append(batch.num_rows)
            before += batch.num_rows
        fields = list(map(schema.names.index, self._columns))
        self._open(pyarrow.ipc.IpcReadOptions(included_fields=fields, use_threads=False))
        return counts

    def _open(self, options: Any = None) -> None:
        """Begins to read the batches with the columns that the options choose."""
        import pyarrow

        self._map.seek(0)
        read = pyarrow.ipc.open_file if self._is_file else pyarrow.ipc.open_stream
        self._reader = read(self._map, options=options)
        self._options = options
        self._next = 0  # the batch of a stream that comes next

    def _batch(self, number: int) -> Any:
        """A record batch; None after the last."""
        if self._is_file:
            return self._reader.get_batch(number) if number < self._reader.num_record_batches else None
        if number < self._next:
            self._open(self._options)
        for _ in range(self._next, number):
            next(self._reader)
        self._next = number + 1
        return next(self._reader, None)

    def _checked(self, batch: Any) -> Any:
        """The batch, with text as bytes. It is validated, since pyarrow trusts its input."""
        import pyarrow

        if self._shard.holds_records:
            batch.validate(full=True)
            return batch
        column = batch.column(0)
        if isinstance(column, pyarrow.DictionaryArray):
            column = pyarrow.DictionaryArray.from_arrays(column.indices, _as_binary(column.dictionary), safe=True)
        else:
            column = _as_binary(column)
        column.validate(full=True)
        return pyarrow.record_batch([column], self._columns)


def _place(group: int, rows_before: int) -> str:
    return f"record batch {group + 1}, from row {rows_before + 1} on,"


def _as_binary(values: Any) -> Any:
    """Strings as bytes, unchecked. A column of type null stays as it is."""
    import pyarrow

    if pyarrow.types.is_null(values.type):
        return values
    if pyarrow.types.is_string_view(values.type):
        return values.cast(pyarrow.binary_view())
    return values.view(pyarrow.binary() if pyarrow.types.is_string(values.type) else pyarrow.large_binary())
