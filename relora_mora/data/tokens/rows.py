"""Reads pre-tokenized text as the rows of a lane, from a memory-mapped file.

The file is in Arrow's IPC format and has a row for each row of the text: ``tokens`` (16 or 32 bits each, without EOS),
``utf8_bytes`` of its text, and ``skipped``, the reason why there is no text, or null. Lanes share it as the text's
file, so the batches are those of the text.
"""

import errno
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import BAD_REASONS, SKIP_REASONS, Skipped, SourceError, unreadable
from relora_mora.data.read import open_rows
from relora_mora.data.rows import Encode, Encoded, EncodeTexts, Rows, TokenIds, share_of
from relora_mora.data.shard import Shard
from relora_mora.data.tokens.index import COMMAND, SourceText, TokenizationSpec
from relora_mora.system.files import LOST_DISK

METADATA = b"relora_mora"  # the key in the schema's metadata


class Header(NamedTuple):
    """The metadata of a file."""

    making: TokenizationSpec
    text: SourceText

    def dump(self) -> bytes:
        return json.dumps([self.making.model_dump(), self.text.model_dump()]).encode()

    @staticmethod
    def load(data: bytes) -> "Header":
        making, text, *_ = json.loads(data)  # files of release 0.2 have a third entry
        return Header(TokenizationSpec(**making), SourceText(**text))


class _Columns(NamedTuple):
    """The columns of a record batch, mapped and not copied."""

    offsets: npt.NDArray[np.int32]  # in ids, one more than there are rows
    ids: TokenIds
    utf8_bytes: npt.NDArray[np.int64]
    skipped: Any  # an Arrow array


class MappedTokens:
    """A file of tokens. Raises SourceError if it is damaged, OSError if its disk is gone (``LOST_DISK``)."""

    def __init__(self, path: str) -> None:
        import pyarrow

        self._path = path
        try:
            self._map = pyarrow.memory_map(path)
            file = pyarrow.ipc.open_file(self._map)
            self._batches = [file.get_batch(number) for number in range(file.num_record_batches)]
            self.head = Header.load(file.schema.metadata[METADATA])
        except FileNotFoundError as error:
            raise SourceError(f"{path} is missing; make it again: {COMMAND}") from error
        except MemoryError:  # pyarrow's is an ArrowException, too
            raise
        except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, PermissionError) or (
                isinstance(error, OSError) and error.errno in {*LOST_DISK, errno.EMFILE}
            ):
                raise unreadable(path, error, "check the path and its permissions") from error
            raise self.damaged(str(error)) from error
        self._starts = [0, *accumulate(batch.num_rows for batch in self._batches)]
        self._at = -1
        self._columns: _Columns | None = None

    @property
    def rows(self) -> int:
        return self._starts[-1]

    def take(self, numbers: range) -> Iterator[TokenIds | Skipped]:
        """The rows with these numbers, which must be increasing."""
        for columns, here in self._parts(numbers):
            begins = columns.offsets[:-1][here].tolist()
            ends = columns.offsets[1:][here].tolist()
            ids = columns.ids
            if columns.skipped.null_count == len(columns.skipped):
                yield from [ids[begin:end] for begin, end in zip(begins, ends, strict=True)]
                continue
            reasons = columns.skipped[here].to_pylist()
            for begin, end, reason in zip(begins, ends, reasons, strict=True):
                if reason is not None and reason not in SKIP_REASONS:
                    raise self.damaged(f"a row is skipped for the reason {reason!r}")
                yield ids[begin:end] if reason is None else Skipped(reason)

    def documents(self) -> Iterator[tuple[TokenIds, int]]:
        """The tokens of every row that is not skipped, and the UTF-8 bytes of its text."""
        for number in range(len(self._batches)):
            numbers = range(self._starts[number], self._starts[number + 1])
            sizes = self._batch(number).utf8_bytes.tolist()
            for ids, size in zip(self.take(numbers), sizes, strict=True):
                if not isinstance(ids, Skipped):
                    yield ids, size

    def counts(self) -> tuple[int, int, int]:
        """Rows that are not skipped, their tokens without EOS, and the UTF-8 bytes of their texts."""
        all_columns = [self._batch(number) for number in range(len(self._batches))]
        return (
            sum(columns.skipped.null_count for columns in all_columns),
            sum(len(columns.ids) for columns in all_columns),
            sum(int(columns.utf8_bytes.sum()) for columns in all_columns),
        )

    def bad_among(self, numbers: range) -> int:
        """How many of the rows with these numbers are bad."""
        return sum(
            reason in BAD_REASONS
            for columns, here in self._parts(numbers)
            if columns.skipped.null_count < len(columns.skipped)
            for reason in columns.skipped[here].to_pylist()
        )

    def damaged(self, reason: str) -> SourceError:
        return SourceError(
            f"{self._path} cannot be read ({' '.join(reason.split())}); it is cut short or damaged: "
            f"remove it and make it again: {COMMAND}"
        )

    def close(self) -> None:
        self._columns = None
        self._batches = []
        self._map.close()

    def _parts(self, numbers: range) -> Iterator[tuple[_Columns, slice]]:
        """The batches that hold these rows, each with the slice of its rows that is wanted."""
        first = numbers.start
        while first < numbers.stop:
            batch = bisect_right(self._starts, first) - 1
            start, end = self._starts[batch : batch + 2]
            stop = min(end, numbers.stop)
            yield self._batch(batch), slice(first - start, stop - start, numbers.step)
            first = range(first, stop, numbers.step)[-1] + numbers.step

    def _batch(self, number: int) -> _Columns:
        if self._columns is None or self._at != number:
            import pyarrow

            batch = self._batches[number]
            try:
                batch.validate(full=True)  # that offsets rise and stay within the file
                tokens = batch.column("tokens")
                sizes = batch.column("utf8_bytes").to_numpy()
                self._columns = _Columns(
                    tokens.offsets.to_numpy(), tokens.values.to_numpy(), sizes, batch.column("skipped")
                )
            except MemoryError:
                raise
            except (pyarrow.ArrowException, KeyError) as error:
                raise self.damaged(str(error)) from error
            self._at = number
        return self._columns


class TokenRows:
    """The tokens of a lane's share of a shard (see ``rows.Rows``).

    Here bad rows are only counted: their number was checked when the tokens were made, and at the start of the run.
    """

    def __init__(self, shard: Shard, *, stride: int = 1, phase: int = 0, bad: int = 0) -> None:
        self.bad = bad
        self._tokens = open_tokens(shard)
        rows = range(self._tokens.rows)
        self.is_empty = not rows
        self._left = share_of(rows, stride, phase) if shard.in_ranges else rows[phase::stride]

    def skip(self, count: int) -> bool:
        enough = count <= len(self._left)
        self._left = self._left[count:]
        return enough

    def take(self, count: int) -> list[TokenIds | Skipped]:
        wanted = self._left[:count]
        self._left = self._left[count:]
        self.bad += self._tokens.bad_among(wanted)
        return list(self._tokens.take(wanted))

    def close(self) -> None:
        self._tokens.close()


def open_tokens(shard: Shard) -> MappedTokens:
    """The file of a pre-tokenized shard. Raises SourceError if it does not match the index of its folder."""
    indexed = shard.tokens
    assert indexed is not None, "a shard of text"
    tokens = MappedTokens(shard.location)
    head = tokens.head
    if (head.making, head.text) != (indexed.making, indexed.text) or tokens.rows != indexed.totals.rows:
        raise tokens.damaged("it is another file than its folder says")
    return tokens


def open_any(
    config: DataConfig, shard: Shard, *, stride: int = 1, phase: int = 0, bad: int = 0, note: Callable[[str], object]
) -> Rows[Any]:
    """The rows of a shard of text, records or tokens (see ``rows.OpenRows``)."""
    if shard.tokens is None:
        return open_rows(config, shard, stride=stride, phase=phase, bad=bad, note=note)
    return TokenRows(shard, stride=stride, phase=phase, bad=bad)


def only_tokens(rows: list[TokenIds]) -> list[Encoded]:
    """A ``rows.Encode`` for rows that are already tokens."""
    return [Encoded(ids) for ids in rows]


def or_tokens(encode: EncodeTexts) -> Encode[Any]:
    """Extends ``encode`` to rows some of which are already tokens."""

    def encode_any(rows: list[Any]) -> list[Encoded]:
        texts = iter(encode([row for row in rows if isinstance(row, str)]))
        return [next(texts) if isinstance(row, str) else Encoded(row) for row in rows]

    return encode_any
