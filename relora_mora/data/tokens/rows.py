"""Reads tokens as the rows of a lane, from a memory-mapped file.

The file is in Arrow's IPC format and has a row for each row of the text: ``tokens`` (16 or 32 bits each, without EOS),
``utf8_bytes`` of its text, ``skipped``, the reason why there are no tokens, or null, and for records ``scored``, a byte
for each token. Lanes share a file as they would share the text's file.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError, unreadable
from relora_mora.data.rows import Encoded, TokenIds, share_of
from relora_mora.data.shard import Shard
from relora_mora.data.tokens.index import COMMAND


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
        self._starts = [0, *accumulate(len(batch.utf8_bytes) for batch in self._batches)]
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


class TokenRows:
    """A lane's share of a file of tokens (see ``rows.JudgedRows``).

    Here bad rows are only counted: their number was checked when the tokens were made, and at the start of the run.
    """

    def __init__(self, shard: Shard, stride: int, phase: int, bad: int) -> None:
        self.bad = bad
        self._tokens = open_tokens(shard)
        rows = range(self._tokens.rows)
        self.is_empty = not rows
        self._left = share_of(rows, stride, phase) if shard.in_ranges else rows[phase::stride]

    def skip(self, count: int) -> bool:
        enough = count <= len(self._left)
        self._left = self._left[count:]
        return enough

    def take(self, count: int) -> list[Encoded | Skipped]:
        rows = [self._tokens.row(number) for number in self._left[:count]]
        self._left = self._left[count:]
        self.bad += sum(isinstance(row, Skipped) and row.reason in BAD_REASONS for row in rows)
        return rows

    def close(self) -> None:
        self._tokens.close()


def open_tokens(shard: Shard) -> MappedTokens:
    """The file of a pre-tokenized shard. Raises SourceError if it does not match the index of its folder."""
    indexed = shard.tokens
    assert indexed is not None, "a shard of text"
    tokens = MappedTokens(shard.location)
    totals = indexed.totals
    if (tokens.rows, tokens.ids + totals.documents) != (totals.rows, totals.tokens):
        raise tokens.damaged("it is another file than its folder says")
    return tokens
