"""Packing: the rows of a lane as token blocks, without padding and without losing a token.

The tokens of a lane are EOS, document, EOS, document, EOS, ... Block k is the ``sequence_length + 1`` tokens from
``k * sequence_length`` on: its last token is the first of the next block, so every token but the very first is
predicted once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from relora_mora.data.errors import SourceError
from relora_mora.data.lane_states import Cursor
from relora_mora.data.lanes import LaneRows
from relora_mora.data.rows import Encode, Row

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

# rows encoded in one call: enough to make the call cheap, few enough that a resume repeats little
ENCODE_ROWS = 64
ENCODE_CHARACTERS = 1 << 15


class Block(NamedTuple):
    """``scored[j]`` says whether the prediction of ``tokens[j + 1]`` counts in the loss; None where all do."""

    tokens: Tokens  # [T + 1]
    scored: Mask | None  # [T]


class _Document(NamedTuple):
    tokens: Tokens  # with its EOS
    scored: Mask | None  # of the same length; None where all are
    after: Cursor


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
        self._cursor = Cursor()
        self._offset = 0  # tokens of the document at the cursor that are packed already
        if restored:
            self._cursor, self._offset = rows.plan.read(restored)
        self._source = rows.rows_from(self._cursor)
        self._pending: deque[_Document] = deque()
        self._error: SourceError | None = None
        self._last = self._last_token()

    def next_block(self) -> Block:
        """Raises SourceError when a shard has too many bad rows or cannot be read."""
        tokens = np.empty(self.sequence_length + 1, np.int32)
        tokens[0] = self._last
        scored: Mask | None = None
        filled = 1
        while filled < len(tokens):
            if not self._pending:
                self._encode_more()
            document = self._pending[0]
            piece = slice(self._offset, self._offset + len(tokens) - filled)
            end = filled + len(document.tokens[piece])
            tokens[filled:end] = document.tokens[piece]
            if document.scored is not None:
                if scored is None:
                    scored = np.ones(self.sequence_length, np.bool_)
                scored[filled - 1 : end - 1] = document.scored[piece]
            self._offset += end - filled
            filled = end
            if self._offset == len(document.tokens):
                self._pending.popleft()
                self._cursor = document.after
                self._offset = 0
        self._last = int(tokens[-1])
        return Block(tokens, scored)

    def state(self) -> dict[str, Any]:
        """A few numbers, JSON-able: all that ``restored`` needs."""
        return self._cursor.state(self._offset)

    def close(self) -> None:
        self._source.close()

    def _last_token(self) -> int:
        """The token before the position: EOS, or one inside the document at the cursor."""
        if not self._offset:
            return self.eos
        self._encode_more()
        tokens = self._pending[0].tokens
        if self._offset >= len(tokens):
            raise SourceError(
                f"lane {self.rows.plan.lane}: the document at the saved position is shorter than it was; "
                "the source or the tokenizer changed"
            )
        return int(tokens[self._offset - 1])

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
        for encoded, cursor in zip(self.encode(rows), after, strict=True):
            tokens = np.empty(len(encoded.ids) + 1, np.int32)
            tokens[:-1] = encoded.ids
            tokens[-1] = self.eos
            scored = None if encoded.scored is None else _with_end(encoded.scored)
            self._pending.append(_Document(tokens, scored, cursor))


def _with_end(scored: Sequence[bool]) -> Mask:
    """The mask of a document with its EOS, which is scored where the token before it is: so an answer learns to end."""
    return np.array([*scored, bool(len(scored)) and scored[-1]], np.bool_)
