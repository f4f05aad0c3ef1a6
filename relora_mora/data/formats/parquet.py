"""Reads the text column or the record columns of Parquet files, one row group at a time.

The footer gives the number of rows in each row group, so a position is found without reading the groups before it. Only
the column chunks that are used are read.
"""

from collections.abc import Iterator
from typing import Any

from relora_mora.data.formats.columns import ColumnFile, Content

READ_BYTES = 1 << 20  # stored bytes of a column chunk per read
BATCH_BYTES = 1 << 22  # bytes of text per batch, estimated from the footer
BATCH_ROWS = 1024


class ParquetColumn(ColumnFile):
    """The groups are row groups."""

    def contents(self, group: int, first: int, stride: int) -> Iterator[tuple[int, Content]]:
        before = self._rows_before[group]
        batches = self._batches(group)
        done = 0  # rows of the group in the batches so far
        while True:
            with self._naming_damage(f"row group {group + 1}, from row {before + done + 1} on,"):
                batch = next(batches, None)
                contents = [] if batch is None else self._contents(batch, first - done, stride)
            if batch is None:
                break
            for content in contents:
                yield before + first + 1, content
                first += stride
            done += len(batch)
        if done != self.group_rows[group]:
            raise self._damaged(f"row group {group + 1}", f"{done} rows, not {self.group_rows[group]}")

    def close(self) -> None:
        self._file.close()
        super().close()

    def _read_schema(self) -> Any:
        import pyarrow.parquet

        # no pre-buffering: a process must be able to end while a request is under way
        self._file = pyarrow.parquet.ParquetFile(
            self._bytes, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True
        )
        return self._file.schema_arrow

    def _count_rows(self, schema: Any) -> list[int]:
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _batches(self, group: int) -> Iterator[Any]:
        """The columns of a row group in batches of rows, since a whole group may be larger than memory."""
        metadata = self._file.metadata
        chunks = [metadata.row_group(group).column(number) for number in self._leaves()]
        if len(chunks) == 1:  # the reads of several chunks are interleaved
            [chunk] = chunks
            start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
            self._bytes.will_read(start, start + chunk.total_compressed_size)
        size = sum(chunk.total_uncompressed_size for chunk in chunks)
        rows = BATCH_BYTES * self.group_rows[group] // max(1, size)
        return self._file.iter_batches(
            max(1, min(BATCH_ROWS, rows)), row_groups=[group], columns=self._columns, use_threads=False
        )

    def _leaves(self) -> list[int]:
        """The numbers of the stored columns: a list of messages is stored as one column for each of their keys."""
        schema = self._file.metadata.schema
        paths = [schema.column(number).path for number in range(self._file.metadata.num_columns)]
        inside = tuple(f"{name}." for name in self._columns)
        return [number for number, path in enumerate(paths) if path in self._columns or path.startswith(inside)]
