"""Files that pyarrow reads, Parquet, Arrow and tokens: only the columns that are used, from any row on.

Lanes that share a file split its rows into equal ranges. The rows of a file are in groups. Parquet's footer locates its
row groups, so a position is found without reading those before it. Arrow's record batches are mapped into memory, so of
a batch that is not compressed only the columns that are used are read. When an Arrow file is opened, all batches are
passed once to count their rows, for which compressed ones are decompressed; those of a compressed stream stay so.

A file of tokens is an Arrow file with a row for each row of the text: ``tokens`` (16 or 32 bits each, without EOS),
``utf8_bytes`` of its text, ``skipped``, the reason why there are no tokens, or null, and for records ``scored``, a byte
for each token. Lanes share it as they would share the text's file.
"""

import io
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from relora_mora.data.errors import ENCODING_REASONS, Skipped, SourceError, too_long, unreadable
from relora_mora.data.rows import Content, Encoded, JudgedRows, TokenIds, share_of
from relora_mora.data.shard import ARROW, PARQUET, Shard
from relora_mora.data.tokens.index import COMMAND
from relora_mora.system.files import LOST_DISK

READ_BYTES = 1 << 20  # stored bytes of a column chunk per read
BATCH_BYTES = 1 << 22  # bytes of text per batch, estimated from the footer
BATCH_ROWS = 1024  # rows that are Python objects at the same time
FILE_MAGIC, END_OF_STREAM = ARROW.endings
_STRINGS = ("string", "large_string", "string_view")
_BYTES = ("binary", "large_binary", "binary_view")

Batches = Callable[[int, int], Iterator[Any]]  # the record batches of a group (from 0), from a row of it on


class RangeRows(JudgedRows):
    """The texts or records of one of ``stride`` equal ranges of the rows of a file.

    Raises SourceError if the file is damaged or lacks the columns, OSError if its disk is gone (``LOST_DISK``).
    """

    def open(self) -> None:
        open_groups = _open_parquet if self.shard.format is PARQUET else _open_arrow
        with self._naming_damage("its footer or schema"):
            sizes, self._batches = open_groups(self.file, self.shard)
        self._starts = [0, *itertools.accumulate(sizes)]
        self._own = share_of(range(self._starts[-1]), self.stride, self.phase)
        self.is_empty = not self._starts[-1]

    def _numbered(self) -> Iterator[tuple[int, Content]]:
        at = self._own.start + self._next
        while at < self._own.stop:
            group = bisect_right(self._starts, at) - 1
            stop = min(self._own.stop, self._starts[group + 1])
            batches = self._batches(group, at - self._starts[group])
            while at < stop:
                with self._naming_damage(f"group {group + 1}, from row {at + 1} on,"):
                    rows = self._contents(next(batches).slice(0, stop - at))
                for row in rows:
                    at += 1
                    yield at, self._row(row)

    def _contents(self, batch: Any) -> list[Any]:
        """A text or the columns of each row, or the reason why it has none."""
        import pyarrow

        values = batch.column(0)
        if not self.shard.records.is_text:
            values = pyarrow.StructArray.from_arrays(batch.columns, batch.schema.names)
        try:
            return values.to_pylist()
        except UnicodeDecodeError:
            return list(map(_content, values))

    def _row(self, content: Any) -> Content:
        if isinstance(content, dict):
            content = self.shard.content_in(content)
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
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, StopIteration) as error:
            if isinstance(error, OSError) and error.errno in LOST_DISK:
                raise
            reason = " ".join(str(error).split()) or "it has fewer rows than the file says"
            raise SourceError(
                f"{self.shard.label}: {where} cannot be read ({reason}); fetch or write it again"
            ) from error


def _content(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return Skipped("invalid_utf8")


def _columns(shard: Shard, schema: Any) -> list[str]:
    """The columns that are read. Raises SourceError if one is missing or holds no text."""
    import pyarrow

    shard.check_names(schema.names)
    columns = [name for name in schema.names if name in shard.columns]
    for column in columns:
        kind = schema.field(column).type
        stored = str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind)  # which stores each value once
        # records also hold lists and numbers; writers use the type null if all values are null
        if stored not in (*_STRINGS, "null") if shard.records.is_text else stored in _BYTES:
            fault = f'holds {kind} in the column "{column}", not strings (pyarrow: column.cast("string"))'
            raise shard.column_error(fault, schema.names)
    return columns


def _open_parquet(file: io.BufferedReader, shard: Shard) -> tuple[Sequence[int], Batches]:
    """The number of rows of each row group, and how to read them.

    Only the column chunks that are used are read, a part at a time, since a group may be larger than memory.
    """
    import pyarrow.parquet

    # no pre-buffering: a process must be able to end while a request is under way
    parquet = pyarrow.parquet.ParquetFile(
        file, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True
    )
    columns = _columns(shard, parquet.schema_arrow)
    inside = tuple(f"{name}." for name in columns)  # a list of messages is stored as one column for each of their keys
    groups = [parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups)]

    def batches(number: int, first: int) -> Iterator[Any]:
        group = groups[number]
        chunks = map(group.column, range(group.num_columns))
        used = sum(each.total_uncompressed_size for each in chunks if f"{each.path_in_schema}.".startswith(inside))
        size = max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(1, used)))
        for batch in parquet.iter_batches(size, row_groups=[number], columns=columns, use_threads=False):
            if first < batch.num_rows:
                yield batch.slice(first)
            first = max(0, first - batch.num_rows)

    return [group.num_rows for group in groups], batches


def _open_arrow(file: io.BufferedReader, shard: Shard) -> tuple[Sequence[int], Batches]:
    """The same of an Arrow file or stream.

    A file has a footer with the positions of its batches. Those of a stream, as ``datasets`` writes it, are kept.
    """
    import pyarrow

    file.close()  # it was compared with the start; pyarrow opens the file itself
    mapped = pyarrow.memory_map(shard.location)
    is_file = mapped.read(len(FILE_MAGIC)) == FILE_MAGIC
    mapped.seek(max(0, mapped.size() - len(END_OF_STREAM)))
    if not is_file and mapped.read() != END_OF_STREAM:
        raise pyarrow.ArrowInvalid("it does not end as a stream does")  # pyarrow accepts a cut between batches
    mapped.seek(0)
    reader = pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
    columns = _columns(shard, reader.schema)
    kept = [] if is_file else list(reader)
    read: Callable[[int], Any] = reader.get_batch if is_file else kept.__getitem__
    count = reader.num_record_batches if is_file else len(kept)

    def batches(number: int, first: int) -> Iterator[Any]:
        batch = read(number).select(columns)
        batch.validate(full=True)  # pyarrow trusts its input
        for start in range(first, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)

    return [read(number).num_rows for number in range(count)], batches


class _Batch(NamedTuple):
    """The columns of a record batch, mapped and not copied."""

    offsets: npt.NDArray[np.int32]  # in ids, one more than there are rows
    ids: TokenIds
    scored: npt.NDArray[np.bool_] | None  # of each id; None: all are
    utf8_bytes: npt.NDArray[np.int64]
    skipped: dict[int, str]  # the reasons of the rows that are skipped

    @staticmethod
    def of(stored: Any) -> "_Batch":
        stored.validate(full=True)  # that offsets rise and stay within the file
        tokens = stored.column("tokens")
        reasons = stored.column("skipped")
        names = reasons.to_pylist() if reasons.null_count < len(reasons) else []
        has_scored = "scored" in stored.schema.names
        return _Batch(
            offsets=tokens.offsets.to_numpy(),
            ids=tokens.values.to_numpy(),
            scored=stored.column("scored").values.to_numpy().view(np.bool_) if has_scored else None,
            utf8_bytes=stored.column("utf8_bytes").to_numpy(),
            skipped={at: reason for at, reason in enumerate(names) if reason is not None},
        )


class MappedTokens:
    """A file of tokens. Raises SourceError if it is damaged, OSError if its disk is gone (``LOST_DISK``)."""

    def __init__(self, path: str) -> None:
        import pyarrow

        self._path = path
        try:
            self._map = pyarrow.memory_map(path)
            file = pyarrow.ipc.open_file(self._map)
            self._batches = [_Batch.of(file.get_batch(number)) for number in range(file.num_record_batches)]
        except MemoryError:  # pyarrow's is an ArrowException, too
            raise
        except (pyarrow.ArrowException, OSError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno:
                raise unreadable(path, error, f"check the path, or make it again: {COMMAND}") from error
            raise self.damaged(str(error)) from error
        self._starts = [0, *itertools.accumulate(len(batch.utf8_bytes) for batch in self._batches)]
        self.ids = sum(len(batch.ids) for batch in self._batches)
        self.utf8_bytes = sum(int(batch.utf8_bytes.sum()) for batch in self._batches)

    @property
    def rows(self) -> int:
        return self._starts[-1]

    def row(self, number: int) -> Encoded | Skipped:
        at = bisect_right(self._starts, number) - 1
        batch = self._batches[at]
        at = number - self._starts[at]
        if at in batch.skipped:
            return Skipped(batch.skipped[at])
        own = slice(batch.offsets[at], batch.offsets[at + 1])
        if batch.scored is None:
            return Encoded(batch.ids[own], utf8_bytes=int(batch.utf8_bytes[at]))
        return Encoded(batch.ids[own], batch.scored[own])

    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each row."""
        parts = [np.diff(batch.offsets) for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)

    def skipped(self) -> Iterator[tuple[int, str]]:
        """The numbers of the rows that are skipped, with the reason of each."""
        for start, batch in zip(self._starts, self._batches, strict=False):
            yield from ((start + at, reason) for at, reason in batch.skipped.items())

    def damaged(self, reason: str) -> SourceError:
        return SourceError(
            f"{self._path} cannot be read ({' '.join(reason.split())}); it is cut short or damaged: "
            f"remove it and make it again: {COMMAND}"
        )

    def close(self) -> None:
        self._batches.clear()
        self._map.close()


class TokenRows(JudgedRows):
    """The rows of a file of tokens. Their bad rows were judged when the tokens were made, so they are only counted.

    As in the text, these do not include records that could not be tokenized.
    """

    def open(self) -> None:
        self.file.close()  # it was compared with the start; pyarrow opens the file itself
        self._tokens = open_tokens(self.shard)
        rows = range(self._tokens.rows)
        self.is_empty = not rows
        in_turn = rows[self.phase :: self.stride]
        self._own = share_of(rows, self.stride, self.phase) if self.shard.in_ranges else in_turn

    def close(self) -> None:
        self._tokens.close()

    def _numbered(self) -> Iterator[tuple[int, Encoded | Skipped]]:
        return ((number + 1, self._tokens.row(number)) for number in self._own[self._next :])

    def _count(self, number: int, skipped: Skipped) -> None:
        self.bad += skipped.reason not in ENCODING_REASONS


def open_tokens(shard: Shard) -> MappedTokens:
    """The file of a pre-tokenized shard. Raises SourceError if it does not match the index of its folder."""
    indexed = shard.tokens
    assert indexed is not None, "a shard of text"
    tokens = MappedTokens(shard.location)
    totals = indexed.totals
    if (tokens.rows, tokens.ids + totals.documents) != (totals.rows, totals.tokens):
        raise tokens.damaged("it is another file than its folder says")
    return tokens
