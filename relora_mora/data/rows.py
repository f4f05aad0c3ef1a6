"""The seam between packing and what is packed.

A lane knows neither the format of its shards nor what their rows mean. It takes two functions: one opens the rows of a
shard (``OpenRows``), the other makes tokens of rows and says which of these are scored (``Encode``). ``file_rows.py``
opens shards of every format, ``encoders.py`` has the functions to tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from relora_mora.data.errors import Skipped
from relora_mora.data.shard import Shard

# What a row holds: a text, say, or the messages of a conversation. Its length is about its number of characters.
Row = TypeVar("Row", bound=Sized)
TokenIds = npt.NDArray[np.integer[Any]]
Ids = Sequence[int] | TokenIds
Scored = Sequence[bool] | npt.NDArray[np.bool_]
T = TypeVar("T")
CALL_CHARACTERS = 1 << 20


def in_calls(rows: Iterable[T], most: int, size: Callable[[T], int], threads: int = 1) -> Iterator[list[T]]:
    """Some at a time, for one call of a tokenizer, which takes dozens of times the memory of their text.

    A row goes to one of its ``threads``.
    """
    some: list[T] = []
    characters = 0
    for row in rows:
        some.append(row)
        characters += size(row)
        if len(some) == most or characters >= threads * CALL_CHARACTERS:
            yield some
            some = []
            characters = 0
    if some:
        yield some


class Rows(Protocol[Row]):
    """A lane's own rows of one shard, in an order that never changes.

    A position is the number of own rows before it, so it means the same on every machine and after every restart. How
    lanes share a shard is the format's decision: lines take turns, row groups are dealt out whole.
    """

    @property
    def bad(self) -> int:
        """Bad rows so far, in the whole of the shard as far as it was looked at; saved with a position."""

    @property
    def is_empty(self) -> bool:
        """Known at the end: the shard holds no rows at all, neither this lane's nor another's."""

    def skip(self, count: int) -> bool:
        """Pass over own rows without looking into them; False where the shard has fewer."""

    def take(self, count: int) -> list[Row | Skipped]:
        """The next own rows, fewer than ``count`` (at least 1) only at the end of the shard, none behind it.

        Raises SourceError where the shard cannot be read or holds too many bad rows.
        """

    def close(self) -> None: ...


def calls_of(rows: Rows[Row], most: int, threads: int = 1) -> Iterator[list[Row | Skipped]]:
    """All that are left of a shard, as :func:`in_calls` has them."""
    while taken := rows.take(most):
        yield from in_calls(taken, most, lambda row: 0 if isinstance(row, Skipped) else len(row), threads)


class OpenRows(Protocol[Row]):
    """Opens a shard for one of the ``stride`` lanes that share it, the one numbered ``phase``, from 0.

    ``bad`` is ``Rows.bad`` at the position that the caller goes on to skip to. ``note`` hears of what is skipped.
    """

    def __call__(
        self, shard: Shard, *, stride: int, phase: int, bad: int, note: Callable[[str], None]
    ) -> Rows[Row]: ...


class Encoded(NamedTuple):
    """The tokens of a row, and for each whether predicting it counts in the loss; None where all do."""

    ids: Ids
    scored: Scored | None = None
    cut: bool = False  # at its end, because a sequence has no room for more


# many rows at once, because a tokenizer's call is not free; what a row becomes must not depend on the others
Encode = Callable[[list[Row]], Sequence[Encoded | Skipped]]
EncodeTexts = Callable[[list[str]], list[Encoded]]
