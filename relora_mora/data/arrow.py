"""Arrow's format for files and streams, as ``datasets`` writes it: the column of text, or those of records, a record
batch after the other.

A file holds a stream between two marks. The messages of a stream say how long they are and how many rows they hold, so
one walk over them, without their bodies, finds every record batch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from relora_mora.data.columns import ColumnFile
from relora_mora.data.groups import Content

FILE_MAGIC = b"ARROW1\0\0"
CONTINUATION = b"\xff\xff\xff\xff"
END_OF_STREAM = CONTINUATION + b"\0\0\0\0"
LOOK_BYTES = 1 << 12  # the beginning of a message, most often with all of its metadata
BATCH_ROWS = 1024  # of a record batch, as Python's objects at once
# format/Message.fbs of Arrow: kinds of messages, and the numbers of fields in their tables
_DICTIONARY = 2
_RECORD_BATCH = 3
# fields of a Message, and of a RecordBatch
_KIND = 1
_HEADER = 2
_BODY_LENGTH = 3
_ROWS = 0


@dataclass(frozen=True)
class Message:
    start: int
    end: int
    kind: int
    rows: int


class ArrowColumn(ColumnFile):
    """The groups are record batches; one is read as a whole, with its other columns."""

    head = "its schema"

    def contents(self, group: int, first: int, stride: int) -> Iterator[tuple[int, Content]]:
        before = self._rows_before[group]
        with self._damage_named(f"record batch {group + 1}, from row {before + 1} on,"):
            batch = self._read(self._batches[group])
        count = batch.num_rows
        if count != self.group_rows[group]:
            raise self._damaged(f"record batch {group + 1}", f"{count} rows, not {self.group_rows[group]}")
        for start in range(first, count, stride * BATCH_ROWS):
            rows = range(start, min(count, start + stride * BATCH_ROWS), stride)
            contents = self._contents(batch.slice(start, rows.stop - start), 0, stride)
            for row, content in zip(rows, contents, strict=True):
                yield before + row + 1, content

    def _read_schema(self) -> Any:
        import pyarrow

        try:
            messages = list(self._walk())
        except struct.error as error:  # a place outside of the metadata
            raise pyarrow.ArrowInvalid("a message makes no sense") from error
        self._dictionaries = [message for message in messages if message.kind == _DICTIONARY]
        self._batches = [message for message in messages if message.kind == _RECORD_BATCH]
        self._schema = b"".join(map(self._message, messages[:1]))
        return pyarrow.ipc.open_stream(self._schema + END_OF_STREAM).schema

    def _count_rows(self, schema: Any) -> list[int]:
        self._options = {"included_fields": list(map(schema.names.index, self._columns)), "use_threads": False}
        return [message.rows for message in self._batches]

    def _walk(self) -> Iterator[Message]:
        import pyarrow

        start = 0
        while True:
            look = self._bytes.read_at(start, min(LOOK_BYTES, self._bytes.size - start))
            if start == 0 and look.startswith(FILE_MAGIC):
                start = len(FILE_MAGIC)
                continue
            if look.startswith(END_OF_STREAM):
                return
            if len(look) < 8 or not look.startswith(CONTINUATION):
                raise pyarrow.ArrowInvalid(f"no message of Arrow at byte {start}")
            body = start + 8 + struct.unpack_from("<i", look, 4)[0]
            if not start + 8 < body <= self._bytes.size:
                raise pyarrow.ArrowInvalid(f"a message at byte {start} that is longer than the file")
            metadata = look[8 : body - start]
            if len(metadata) < body - start - 8:
                metadata = self._bytes.read_at(start + 8, body - start - 8)
            message = _parse(metadata, start, body)
            if not start < message.end <= self._bytes.size or message.rows < 0:
                raise pyarrow.ArrowInvalid(f"a message at byte {start} that is longer than the file or has no length")
            yield message
            start = message.end

    def _read(self, batch: Message) -> Any:
        """The columns in a record batch, checked, since pyarrow trusts what it reads; that of text as bytes."""
        import pyarrow

        options = pyarrow.ipc.IpcReadOptions(**self._options)
        needed = [message for message in self._dictionaries if message.end <= batch.start]
        stream = b"".join([self._schema, *map(self._message, [*needed, batch]), END_OF_STREAM])
        read = pyarrow.ipc.open_stream(stream, options=options).read_next_batch()
        if self._shard.holds_records:
            read.validate(full=True)
            return read
        column = read.column(0)
        if isinstance(column, pyarrow.DictionaryArray):
            column = pyarrow.DictionaryArray.from_arrays(column.indices, _as_binary(column.dictionary), safe=True)
        else:
            column = _as_binary(column)
        column.validate(full=True)
        return pyarrow.record_batch([column], self._columns)

    def _message(self, message: Message) -> bytes:
        return self._bytes.read_at(message.start, message.end - message.start)


def _parse(metadata: bytes, start: int, body: int) -> Message:
    """A message that begins at byte ``start`` and has its body at ``body``. Raises struct.error for nonsense."""
    message = struct.unpack_from("<I", metadata)[0]
    kind = _field(metadata, message, _KIND, "<B")
    at = _place(metadata, message, _HEADER)
    header = at + struct.unpack_from("<I", metadata, at)[0]
    rows = _field(metadata, header, _ROWS, "<q") if kind == _RECORD_BATCH else 0
    return Message(start, body + _field(metadata, message, _BODY_LENGTH, "<q"), kind, rows)


def _field(buffer: bytes, table: int, number: int, kind: str) -> int:
    """A number in a table of flatbuffers; one that is left out is 0."""
    at = _place(buffer, table, number)
    return struct.unpack_from(kind, buffer, at)[0] if at else 0


def _place(buffer: bytes, table: int, number: int) -> int:
    """Where a field of a table begins; 0 where it is left out. A table begins with the way to its list of places."""
    places = table - struct.unpack_from("<i", buffer, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", buffer, places)[0]:
        return 0
    offset = struct.unpack_from("<H", buffer, places + 4 + 2 * number)[0]
    return table + offset if offset else 0


def _as_binary(values: Any) -> Any:
    import pyarrow

    kinds = {"string": pyarrow.binary(), "large_string": pyarrow.large_binary(), "string_view": pyarrow.binary_view()}
    kind = kinds[str(values.type)]
    return values.cast(kind) if pyarrow.types.is_binary_view(kind) else values.view(kind)
