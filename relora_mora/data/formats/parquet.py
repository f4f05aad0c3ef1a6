"""Parquet: the column of text of a file, or those of its records, a row group after the other.

The footer says how many rows each row group has, so a position is found without reading what comes before its group,
and of a file only the chunks of these columns are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from relora_mora.data.formats.columns import ColumnFile, Content

READ_BYTES = 1 << 20  # of a column chunk at once, as stored
BATCH_BYTES = 1 << 22  # of text at once, as far as the footer tells
BATCH_ROWS = 1024


class ParquetColumn(ColumnFile):
    """The groups are row groups."""

    def contents(self, group: int, first: int, stride: int) -> Iterator[tuple[int, Content]]:
        before = self._rows_before[group]
        batches = self._batches(group)
        behind = 0  # rows of the group in the batches so far
        while True:
            with self._damage_named(f"row group {group + 1}, from row {before + behind + 1} on,"):
                batch = next(batches, None)
                contents = [] if batch is None else self._contents(batch, first - behind, stride)
            if batch is None:
                break
            for content in contents:
                yield before + first + 1, content
                first += stride
            behind += len(batch)
        if behind != self.group_rows[group]:
            raise self._damaged(f"row group {group + 1}", f"{behind} rows where {self.group_rows[group]} should be")

    def close(self) -> None:
        self._file.close()
        super().close()

    def _read_schema(self) -> Any:
        import pyarrow.parquet

        # nothing is read ahead: a process must be able to end while a request is under way
        self._file = pyarrow.parquet.ParquetFile(
            self._bytes, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True
        )
        return self._file.schema_arrow

    def _count_rows(self, schema: Any) -> list[int]:
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _batches(self, group: int) -> Iterator[Any]:
        """The columns in a row group, some rows at a time, since a whole group may be larger than memory."""
        metadata = self._file.metadata
        chunks = [metadata.row_group(group).column(number) for number in self._leaves()]
        if len(chunks) == 1:  # several are read by turns
            [chunk] = chunks
            start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
            self._bytes.will_read(start, start + chunk.total_compressed_size)
        size = sum(chunk.total_uncompressed_size for chunk in chunks)
        rows = BATCH_BYTES * self.group_rows[group] // max(1, size)
        return self._file.iter_batches(
            max(1, min(BATCH_ROWS, rows)), row_groups=[group], columns=self._columns, use_threads=False
        )

    def _leaves(self) -> list[int]:
        """The columns as they are stored: that of a list of messages is stored as one for each of their keys."""
        schema = self._file.metadata.schema
        paths = [schema.column(number).path for number in range(self._file.metadata.num_columns)]
        inside = tuple(f"{name}." for name in self._columns)
        return [number for number, path in enumerate(paths) if path in self._columns or path.startswith(inside)]
