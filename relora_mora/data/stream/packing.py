"""Packing as a stream: the rows of a lane as token blocks, without padding and without losing a token.

The tokens of a lane are EOS, document, EOS, document, EOS, ... Block k is the ``sequence_length + 1`` tokens from
``k * sequence_length`` on: its last token is the first of the next block, so every token but the very first is
predicted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from relora_mora.data.lane_states import LaneStates

if TYPE_CHECKING:
    import torch
import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, Protocol

from relora_mora.data.errors import SourceError
from relora_mora.data.lane_states import Cursor
from relora_mora.data.lanes import LaneRows
from relora_mora.data.rows import Encode, Encoded, Row, Scored
from relora_mora.data.stream.encoded_rows import EncodedRows

UNSCORED = -100  # cross entropy's ignore_index


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: ``n = batch_size / world_size`` sequences, ordered by lane.

    ``labels`` are already shifted: ``labels[i, j]`` is the token after ``input_ids[i, j]``, or ``UNSCORED``.
    ``document_ids`` number the documents inside each sequence. ``state`` says where this rank's lanes are after this
    batch.
    """

    input_ids: torch.Tensor  # int64 [n, T]
    labels: torch.Tensor  # int64 [n, T]
    document_ids: torch.Tensor | None  # int32 [n, T], where attention stays within a document
    state: LaneStates
    counts: dict[str, int]  # see counts_of; and retries, of its workers and this process since the stream was built
    notes: list[str]  # skipped lines met on the way, a few per shard: for the log


def document_ids(input_ids: npt.NDArray[Any], eos: int) -> npt.NDArray[np.int32]:
    """int32 [..., T]: the number of EOS up to and including each token of ``input_ids`` [..., T].

    An EOS belongs to the document after it, as that document's first input, just as at the start of a text that is
    scored alone. What predicts a document's first token then sees nothing of the document before.
    """
    return np.cumsum(input_ids == eos, axis=-1, dtype=np.int32)


def document_boundaries(ids: torch.Tensor) -> torch.Tensor:
    """Document ids [B, T], on the CPU -> int32 [P + 1]: where each document begins among all N = B T tokens, then N.

    The first token of a sequence begins one.
    """
    import torch

    numbers = ids.numpy()
    begins = np.ones(numbers.shape, np.bool_)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    boundaries = np.append(np.flatnonzero(begins), numbers.size)
    return torch.from_numpy(boundaries.astype(np.int32))


Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
DocumentIds = npt.NDArray[np.int32]


class Block(NamedTuple):
    """``scored[j]`` says whether the prediction of ``tokens[j + 1]`` counts in the loss; None where all do.

    ``documents`` numbers the documents that the inputs, all tokens but the last, belong to; None: attention goes back
    to the beginning.
    """

    tokens: Tokens  # [T + 1]
    scored: Mask | None  # [T]
    documents: DocumentIds | None = None  # [T]


class Packer(Protocol):
    """The blocks of a lane, one after the other. ``state()`` is where the one after it begins."""

    rows: LaneRows[Any]

    def next_block(self) -> Block:
        """Raises SourceError when a shard has too many bad rows or cannot be read."""

    def state(self) -> dict[str, Any]:
        """A few numbers, JSON-able."""

    def close(self) -> None: ...


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
        document_mask: bool = False,
        restored: Mapping[str, Any] | None = None,
    ) -> None:
        self.rows = rows
        self.eos = eos
        self.document_mask = document_mask
        self.sequence_length = sequence_length
        cursor = Cursor()
        self._at = 0  # tokens of the documents at hand that are packed already
        if restored:
            cursor, self._at = rows.plan.read(restored)
        self._source = EncodedRows(rows, encode, cursor)
        self._documents = _Documents(cursor, np.empty(0, np.int32), None, [], [])
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
        documents = document_ids(tokens[:-1], self.eos) if self.document_mask else None
        return Block(tokens, scored, documents)

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
        before, encoded, after = self._source.next_group()
        tokens, scored, ends = joined(encoded, self.eos)
        self._documents = _Documents(before, tokens, scored, ends, after)


def joined(rows: Sequence[Encoded], eos: int) -> tuple[Tokens, Mask | None, list[int]]:
    """Rows, each with an EOS behind it: their tokens, which are scored (None: all), and where each ends."""
    ends = list(itertools.accumulate(len(row.ids) + 1 for row in rows))
    tokens = np.empty(ends[-1], np.int32)
    begin = 0
    for row, end in zip(rows, ends, strict=True):
        tokens[begin : end - 1] = row.ids
        tokens[end - 1] = eos
        begin = end
    return tokens, _masks(rows), ends


def _masks(rows: Sequence[Encoded]) -> Mask | None:
    if all(row.scored is None for row in rows):
        return None
    return np.concatenate(
        [np.ones(len(row.ids) + 1, np.bool_) if row.scored is None else with_end(row.scored) for row in rows]
    )


def with_end(scored: Scored) -> Mask:
    """The mask of a row with its EOS, which is scored where the token before it is: so an answer learns to end."""
    return np.array([*scored, bool(len(scored)) and scored[-1]], np.bool_)
