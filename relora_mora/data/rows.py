"""The interface between packing and the rows that are packed.

A lane knows neither the format of its shards nor the meaning of their rows. It is given two functions: one opens the
rows of a shard (``OpenRows``), the other tokenizes rows and marks the scored tokens (``Encode``). ``read.py`` opens
shards of every format, and ``encoders.py`` has the functions that tokenize.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from relora_mora.data.errors import Skipped
from relora_mora.data.shard import Shard

# The content of a row, such as a text or the messages of a conversation. len() is about its number of characters.
Row = TypeVar("Row", bound=Sized)
TokenIds = npt.NDArray[np.integer[Any]]
Ids = Sequence[int] | TokenIds
Scored = Sequence[bool] | npt.NDArray[np.bool_]
T = TypeVar("T")
CALL_CHARACTERS = 1 << 20


def in_calls(rows: Iterable[T], most: int, size: Callable[[T], int], threads: int = 1) -> Iterator[list[T]]:
    """Batches rows for one tokenizer call each, bounded in rows (``most``) and characters (per thread).

    A call needs dozens of times the memory of its text. Each row is tokenized by one of ``threads`` threads.
    """
    batch: list[T] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += size(row)
        if len(batch) == most or characters >= threads * CALL_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def share_of(rows: range, lanes: int, lane: int) -> range:
    """One of the equal ranges into which so many lanes split the rows of a file with columns."""
    return rows[-(-len(rows) * lane // lanes) : -(-len(rows) * (lane + 1) // lanes)]


class Rows(Protocol[Row]):
    """A lane's own rows of one shard, in an order that never changes.

    A position is the number of own rows before it, so it means the same on every machine and after every restart. The
    format decides how lanes share a shard: they take lines in turn, and split files with columns into equal ranges.
    """

    bad: int  # bad rows so far among the own rows; saved with a position
    is_empty: bool  # whether the shard holds no rows, neither of this lane nor of another; known at its end

    def skip(self, count: int) -> bool:
        """Skips own rows without decoding them; False if the shard has fewer."""

    def take(self, count: int) -> list[Row | Skipped]:
        """The next ``count`` (at least 1) own rows; fewer only at the end of the shard, and none after it.

        Raises SourceError if the shard cannot be read or holds too many bad rows.
        """

    def close(self) -> None: ...


def calls_of(rows: Rows[Row], most: int, threads: int = 1) -> Iterator[list[Row | Skipped]]:
    """All remaining rows of a shard, in the batches of :func:`in_calls`."""
    while taken := rows.take(most):
        yield from in_calls(taken, most, lambda row: 0 if isinstance(row, Skipped) else len(row), threads)


class OpenRows(Protocol[Row]):
    """Opens a shard for lane ``phase`` (from 0) of the ``stride`` lanes that share it.

    ``bad`` is ``Rows.bad`` at the position to which the caller skips next. ``note`` gets a message about skipped rows.
    """

    def __call__(
        self, shard: Shard, *, stride: int, phase: int, bad: int, note: Callable[[str], object]
    ) -> Rows[Row]: ...


class Encoded(NamedTuple):
    """The tokens of a row, and for each token whether predicting it counts in the loss; None if all do."""

    ids: Ids
    scored: Scored | None = None
    cut: bool = False  # the row lost its end, because it was longer than a sequence
    utf8_bytes: int | None = None  # the size of its text, if that is known and all of it is scored


# Encodes many rows at once, because a tokenizer call has a cost. The result for a row must not depend on the others.
Encode = Callable[[list[Row]], Sequence[Encoded | Skipped]]
EncodeTexts = Callable[[list[str]], list[Encoded]]
