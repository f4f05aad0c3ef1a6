"""Packing: the rows of a lane as token blocks, without padding and without losing a token.

The tokens of a lane are EOS, document, EOS, document, EOS, ... Block k is the ``sequence_length + 1`` tokens from
``k * sequence_length`` on: its last token is the first of the next block, so every token but the very first is
predicted once.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from relora_mora.data.errors import SourceError
from relora_mora.data.lane_states import Cursor
from relora_mora.data.lanes import LaneRows
from relora_mora.data.rows import Encode, Encoded, Row

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

# rows encoded in one call: enough to make the call cheap, few enough that a resume repeats little
ENCODE_ROWS = 64
ENCODE_CHARACTERS = 1 << 15


class Block(NamedTuple):
    """``scored[j]`` says whether the prediction of ``tokens[j + 1]`` counts in the loss; None where all do."""

    tokens: Tokens  # [T + 1]
    scored: Mask | None  # [T]


class _Documents(NamedTuple):
    """The rows of one call of ``encode``, each with its EOS."""

    before: Cursor
    tokens: Tokens  # of all of them
    scored: Mask | None  # of the same length; None where all are
    ends: list[int]  # in tokens, of each
    after: list[Cursor]  # behind each


class Lane(Generic[Row]):
    """``next_block()`` gives the next block; ``state()`` is where the one after it begins.

    ``restored`` is such a state, of this lane. Raises SourceError where the source does not fit it.
    """

    def __init__(
        self,
        rows: LaneRows[Row],
        encode: Encode[Row],
        *,
        eos: int,
        sequence_length: int,
        restored: Mapping[str, Any] | None = None,
    ) -> None:
        self.rows = rows
        self.encode = encode
        self.eos = eos
        self.sequence_length = sequence_length
        cursor = Cursor()
        self._at = 0  # tokens of the documents at hand that are packed already
        if restored:
            cursor, self._at = rows.plan.read(restored)
        self._source = rows.rows_from(cursor)
        self._documents = _Documents(cursor, np.empty(0, np.int32), None, [], [])
        self._error: SourceError | None = None
        self._last = self._last_token()

    def next_block(self) -> Block:
        """Raises SourceError when a shard has too many bad rows or cannot be read."""
        length = self.sequence_length + 1
        tokens = np.empty(length, np.int32)
        tokens[0] = self._last
        scored: Mask | None = None
        filled = 1
        while filled < length:
            begin = self._at
            packed = self._documents.tokens[begin : begin + length - filled]
            if not packed.size:
                self._encode_more()
                self._at = 0
                continue
            end = filled + packed.size
            tokens[filled:end] = packed
            self._at = begin + packed.size
            if self._documents.scored is not None:
                mask = self._documents.scored[begin : self._at]
                if scored is None and not mask.all():
                    scored = np.ones(self.sequence_length, np.bool_)
                if scored is not None:
                    scored[filled - 1 : end - 1] = mask
            filled = end
        self._last = int(tokens[-1])
        return Block(tokens, scored)

    def state(self) -> dict[str, Any]:
        """A few numbers, JSON-able: all that ``restored`` needs."""
        documents = self._documents
        done = bisect_right(documents.ends, self._at)
        if not done:
            return documents.before.state(self._at)
        return documents.after[done - 1].state(self._at - documents.ends[done - 1])

    def close(self) -> None:
        self._source.close()

    def _last_token(self) -> int:
        """The token before the position: EOS, or one inside the document at the cursor."""
        if not self._at:
            return self.eos
        self._encode_more()
        if self._at >= self._documents.ends[0]:
            raise SourceError(
                f"lane {self.rows.plan.lane}: the document at the saved position is shorter than it was; "
                "the source or the tokenizer changed"
            )
        return int(self._documents.tokens[self._at - 1])

    def _encode_more(self) -> None:
        """Make tokens of the next rows. An error waits until the documents before it are used up."""
        if self._error is not None:
            raise self._error
        rows: list[Row] = []
        after: list[Cursor] = []
        characters = 0
        try:
            while len(rows) < ENCODE_ROWS and characters < ENCODE_CHARACTERS:
                row, cursor = next(self._source)
                rows.append(row)
                after.append(cursor)
                characters += len(row)
        except SourceError as error:
            self._error = error
            if not rows:
                raise
        before = self._documents.after[-1] if self._documents.after else self._documents.before
        encoded = self.encode(rows)
        ends = list(itertools.accumulate(len(document.ids) + 1 for document in encoded))
        tokens = np.empty(ends[-1], np.int32)
        begin = 0
        for document, end in zip(encoded, ends, strict=True):
            tokens[begin : end - 1] = document.ids
            tokens[end - 1] = self.eos
            begin = end
        self._documents = _Documents(before, tokens, _masks(encoded), ends, after)


def _masks(encoded: Sequence[Encoded]) -> Mask | None:
    """The masks of documents, one behind the other, each with that of its EOS; None where all tokens are scored."""
    if all(document.scored is None for document in encoded):
        return None
    return np.concatenate(
        [
            np.ones(len(document.ids) + 1, np.bool_) if document.scored is None else _with_end(document.scored)
            for document in encoded
        ]
    )


def _with_end(scored: Sequence[bool]) -> Mask:
    """The mask of a document with its EOS, which is scored where the token before it is: so an answer learns to end."""
    return np.array([*scored, bool(len(scored)) and scored[-1]], np.bool_)
