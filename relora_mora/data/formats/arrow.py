"""Reads the text column or the record columns of Arrow files and streams, one record batch at a time.

A stream, the format that ``datasets`` writes, is a sequence of messages. Each gives its length and number of rows, so a
walk over the messages finds every record batch without reading their bodies. A file has a footer with the positions of
its record batches. The bytes before the first of them depend on the writer; pyarrow's file reader handles them.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from relora_mora.data.bytes.local import RandomAccessFile
from relora_mora.data.formats.columns import ColumnFile, Content

FILE_MAGIC = b"ARROW1"
CONTINUATION = b"\xff\xff\xff\xff"
END_OF_STREAM = CONTINUATION + b"\0\0\0\0"
LOOK_BYTES = 1 << 12
BATCH_ROWS = 1024  # rows of a record batch that are Python objects at the same time
# format/Message.fbs of Arrow: the kinds of messages, and the numbers of the fields in their tables
_DICTIONARY = 2
_RECORD_BATCH = 3
# fields of a Message, and of a RecordBatch
_KIND = 1
_HEADER = 2
_BODY_LENGTH = 3
_ROWS = 0
# format/File.fbs: the field of a Footer that lists the record batches; an entry begins with its message's position
_BATCHES = 3
_BATCH_BYTES = 24


@dataclass(frozen=True)
class Message:
    start: int
    end: int
    kind: int
    rows: int


class ArrowColumn(ColumnFile):
    """The groups are record batches; each is read as a whole."""

    head = "its schema"

    def contents(self, group: int, first: int, stride: int) -> Iterator[tuple[int, Content]]:
        before = self._rows_before[group]
        with self._naming_damage(f"record batch {group + 1}, from row {before + 1} on,"):
            batch = self._read(group)
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

        head = self._look(0)
        self._is_file = head.startswith(FILE_MAGIC)
        if self._is_file:
            self._footed = _FooterInMemory(self._bytes)
            schema = pyarrow.ipc.open_file(self._footed).schema
            with _as_arrow_error():
                self._batches = [self._message_at(start, self._look(start)) for start in _starts(self._footed.footer)]
            return schema
        with _as_arrow_error():
            messages = list(self._walk(head))
        self._dictionaries = [message for message in messages if message.kind == _DICTIONARY]
        self._batches = [message for message in messages if message.kind == _RECORD_BATCH]
        self._schema = b"".join(map(self._message, messages[:1]))
        return pyarrow.ipc.open_stream(self._schema + END_OF_STREAM).schema

    def _count_rows(self, schema: Any) -> list[int]:
        import pyarrow

        fields = list(map(schema.names.index, self._columns))
        self._options = pyarrow.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        if self._is_file:
            self._file = pyarrow.ipc.open_file(self._footed, options=self._options)
        return [message.rows for message in self._batches]

    def _look(self, start: int) -> bytes:
        """The bytes from a position on, usually enough for a message's metadata; none outside of the file."""
        left = self._bytes.size - start
        return self._bytes.read_at(start, min(LOOK_BYTES, left)) if 0 <= left <= self._bytes.size else b""

    def _walk(self, look: bytes) -> Iterator[Message]:
        """The messages of a stream that begins with the bytes ``look``."""
        start = 0
        while not look.startswith(END_OF_STREAM):
            message = self._message_at(start, look)
            yield message
            start = message.end
            look = self._look(start)

    def _message_at(self, start: int, look: bytes) -> Message:
        import pyarrow

        if len(look) < 8 or not look.startswith(CONTINUATION):
            raise pyarrow.ArrowInvalid(f"there is no Arrow message at byte {start}")
        body = start + 8 + struct.unpack_from("<i", look, 4)[0]
        if not start + 8 < body <= self._bytes.size:
            raise pyarrow.ArrowInvalid(f"the message at byte {start} is longer than the file")
        metadata = look[8 : body - start]
        if len(metadata) < body - start - 8:
            metadata = self._bytes.read_at(start + 8, body - start - 8)
        message = _parse(metadata, start, body)
        if not start < message.end <= self._bytes.size or message.rows < 0:
            raise pyarrow.ArrowInvalid(f"the message at byte {start} is longer than the file or has no length")
        return message

    def _read(self, group: int) -> Any:
        """The columns of a record batch, with text as bytes. They are validated, since pyarrow trusts its input."""
        import pyarrow

        read = self._file.get_batch(group) if self._is_file else self._read_stream(self._batches[group])
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

    def _read_stream(self, batch: Message) -> Any:
        import pyarrow

        needed = [message for message in self._dictionaries if message.end <= batch.start]
        stream = b"".join([self._schema, *map(self._message, [*needed, batch]), END_OF_STREAM])
        return pyarrow.ipc.open_stream(stream, options=self._options).read_next_batch()

    def _message(self, message: Message) -> bytes:
        return self._bytes.read_at(message.start, message.end - message.start)


class _FooterInMemory(RandomAccessFile):
    """Keeps the end of a file in memory: pyarrow reads it in its own thread, where a request could not be stopped."""

    def __init__(self, file: RandomAccessFile) -> None:
        import pyarrow

        super().__init__(file.size)
        tail_bytes = 4 + len(FILE_MAGIC)  # the length of the footer, and the magic bytes
        tail = file.read_at(max(0, file.size - tail_bytes), min(file.size, tail_bytes))
        length = struct.unpack_from("<i", tail)[0] if len(tail) == tail_bytes else 0
        self._file = file
        self._start = file.size - tail_bytes - length
        if length <= 0 or self._start < 0:
            raise pyarrow.ArrowInvalid("it has no footer")
        self.footer = file.read_at(self._start, length)
        self._end = self.footer + tail

    def read_at(self, position: int, size: int) -> bytes:
        at = position - self._start
        return self._file.read_at(position, size) if at < 0 else self._end[at : at + size]


def _starts(footer: bytes) -> Iterator[int]:
    """The positions of the record batches of a file."""
    at = _field_position(footer, struct.unpack_from("<I", footer)[0], _BATCHES)
    vector = at + struct.unpack_from("<I", footer, at)[0]
    count = struct.unpack_from("<I", footer, vector)[0] if at else 0
    for number in range(count):
        yield struct.unpack_from("<q", footer, vector + 4 + number * _BATCH_BYTES)[0]


@contextmanager
def _as_arrow_error() -> Iterator[None]:
    """Turns the error for a position outside of the metadata into one of pyarrow."""
    import pyarrow

    try:
        yield
    except struct.error as error:
        raise pyarrow.ArrowInvalid("the metadata of a message is invalid") from error


def _parse(metadata: bytes, start: int, body: int) -> Message:
    """A message that begins at byte ``start``, with its body at ``body``. Raises struct.error for invalid metadata."""
    message = struct.unpack_from("<I", metadata)[0]
    kind = _field(metadata, message, _KIND, "<B")
    at = _field_position(metadata, message, _HEADER)
    header = at + struct.unpack_from("<I", metadata, at)[0]
    rows = _field(metadata, header, _ROWS, "<q") if kind == _RECORD_BATCH else 0
    return Message(start, body + _field(metadata, message, _BODY_LENGTH, "<q"), kind, rows)


def _field(buffer: bytes, table: int, number: int, kind: str) -> int:
    """A number in a flatbuffers table; 0 if the field is left out."""
    at = _field_position(buffer, table, number)
    return struct.unpack_from(kind, buffer, at)[0] if at else 0


def _field_position(buffer: bytes, table: int, number: int) -> int:
    """The position of a field of a table; 0 if it is left out. A table begins with the offset of its vtable."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", buffer, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", buffer, vtable + 4 + 2 * number)[0]
    return table + offset if offset else 0


def _as_binary(values: Any) -> Any:
    """Strings as bytes, unchecked. A column of type null stays as it is."""
    import pyarrow

    if pyarrow.types.is_null(values.type):
        return values
    if pyarrow.types.is_string_view(values.type):
        return values.cast(pyarrow.binary_view())
    return values.view(pyarrow.binary() if pyarrow.types.is_string(values.type) else pyarrow.large_binary())
