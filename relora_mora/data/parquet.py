"""Parquet: one column of a file, a row group after the other.

The footer says how many rows each row group has, so a position is found without reading what comes before its group,
and of a file only the chunks of the text's column are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from relora_mora.data.columns import ColumnFile, utf8

READ_BYTES = 1 << 20  # of a column chunk at once, as stored
BATCH_BYTES = 1 << 22  # of text at once, as far as the footer tells
BATCH_ROWS = 1024


class ParquetColumn(ColumnFile):
    """The groups are row groups."""

    def texts(self, group: int, first: int, stride: int) -> Iterator[tuple[int, bytes | None]]:
        before = self._rows_before[group]
        batches = self._batches(group)
        behind = 0  # rows of the group in the batches so far
        while True:
            with self._damage_named(f"row group {group + 1}, from row {before + behind + 1} on,"):
                batch = next(batches, None)
                texts = [] if batch is None else utf8(batch.column(0))[first - behind :: stride].to_pylist()
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
        """The column in a row group, some rows at a time, since a whole group may be larger than memory."""
        metadata = self._file.metadata
        paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        chunk = metadata.row_group(group).column(paths.index(self._shard.text_column))
        start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
        self._bytes.will_read(start, start + chunk.total_compressed_size)
        rows = BATCH_BYTES * self.group_rows[group] // max(1, chunk.total_uncompressed_size)
        return self._file.iter_batches(
            max(1, min(BATCH_ROWS, rows)), row_groups=[group], columns=[self._shard.text_column], use_threads=False
        )
