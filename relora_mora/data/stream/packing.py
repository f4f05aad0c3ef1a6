"""Packing as a stream: cuts the rows of a lane into token blocks without padding and without losing a token.

Rows that cannot be used are skipped and counted; too many are an error.

The tokens of a lane are EOS, document, EOS, document, EOS, ... Block k is the ``sequence_length + 1`` tokens from
``k * sequence_length`` on. Its last token is also the first of the next block, so every token except the very first is
predicted exactly once.
"""

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from relora_mora.data.errors import ENCODING_REASONS, Skipped, SourceError
from relora_mora.data.lanes import Cursor, LaneRows, LaneStates
from relora_mora.data.rows import NOTES_PER_REASON, Encode, Encoded, Row, Scored, too_many_records

if TYPE_CHECKING:
    import torch

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
DocumentIds = npt.NDArray[np.int32]

UNSCORED = -100  # cross entropy's ignore_index
# limits of one call of encode: large enough to make the call cheap, small enough that a resume repeats little
ENCODE_ROWS = 64
ENCODE_CHARACTERS = 1 << 15


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: ``n = batch_size / world_size`` sequences, ordered by lane.

    ``labels`` are already shifted: ``labels[i, j]`` is the token after ``input_ids[i, j]``, or ``UNSCORED``.
    ``document_ids`` number the documents inside each sequence. ``state`` is the position of this rank's lanes after
    this batch.
    """

    input_ids: "torch.Tensor"  # int64 [n, T]
    labels: "torch.Tensor"  # int64 [n, T]
    document_ids: "torch.Tensor | None"  # int32 [n, T]; None unless attention stays within a document
    state: LaneStates
    counts: dict[str, int]  # see counts_of; plus retries of this process and its workers since the stream was built
    notes: list[str]  # for the log: lines that were skipped, a few per shard


def document_ids(input_ids: npt.NDArray[Any], eos: int) -> npt.NDArray[np.int32]:
    """int32 [..., T]: the number of EOS up to and including each token of ``input_ids`` [..., T].

    An EOS belongs to the document after it and is that document's first input, as it is when a text is scored by
    itself. The prediction of a document's first token therefore does not depend on the document before.
    """
    return np.cumsum(input_ids == eos, axis=-1, dtype=np.int32)


def document_boundaries(ids: "torch.Tensor") -> "torch.Tensor":
    """Document ids [B, T], on the CPU -> int32 [P + 1]: the offset of each document in all N = B T tokens, then N.

    The first token of each sequence begins a document.
    """
    import torch

    numbers = ids.numpy()
    begins = np.ones(numbers.shape, np.bool_)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    boundaries = np.append(np.flatnonzero(begins), numbers.size)
    return torch.from_numpy(boundaries.astype(np.int32))


class Block(NamedTuple):
    """``scored[j]`` says whether the prediction of ``tokens[j + 1]`` counts in the loss.

    ``documents`` gives the document number of each input (all tokens but the last); 0 for all if attention may reach
    back to the beginning of the block.
    """

    tokens: Tokens  # [T + 1]
    scored: Mask  # [T]
    documents: DocumentIds  # [T]


class _Documents(NamedTuple):
    """The rows of one call of ``encode``, each with its EOS."""

    before: Cursor
    tokens: Tokens  # of all rows
    scored: Mask  # of the same length
    ends: list[int]  # of each row, in tokens
    after: list[Cursor]  # the position after each row


class Lane(Generic[Row]):
    """The blocks of a lane, one after the other. ``state()`` is the position at which the next block begins.

    ``restored`` is an earlier state of this lane. Raises SourceError if the source does not match it. ``notes`` are
    messages about skipped rows; the owner empties the list.
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
        self.notes = rows.notes
        self.eos = eos
        self.document_mask = document_mask
        self.sequence_length = sequence_length
        cursor = Cursor()
        self._at = 0  # tokens of self._documents that are already in a block
        if restored:
            cursor, self._at = rows.plan.read(restored)
        self._encode = encode
        self._source = rows.rows_from(cursor)
        self._after = cursor  # the position after all rows that were encoded
        self._used_epoch = cursor.epoch  # of the last usable row
        self._passed = Counter[str]()  # why rows were skipped here; the source counts these rows as documents
        self._error: SourceError | None = None
        self._documents = _Documents(cursor, np.empty(0, np.int32), np.empty(0, np.bool_), [], [])
        self._last = self._last_token()

    def next_block(self) -> Block:
        """Raises SourceError when a shard has too many bad rows or cannot be read."""
        length = self.sequence_length + 1
        tokens = np.empty(length, np.int32)
        scored = np.empty(length, np.bool_)
        tokens[0] = self._last
        filled = 1
        while filled < length:
            packed = self._documents.tokens[self._at : self._at + length - filled]
            if not packed.size:
                self._encode_more()
                self._at = 0
                continue
            end = filled + packed.size
            tokens[filled:end] = packed
            scored[filled:end] = self._documents.scored[self._at : self._at + packed.size]
            self._at += packed.size
            filled = end
        self._last = int(tokens[-1])
        inputs = tokens[:-1]
        documents = document_ids(inputs, self.eos) if self.document_mask else np.zeros_like(inputs)
        return Block(tokens, scored[1:], documents)

    def state(self) -> dict[str, Any]:
        documents = self._documents
        done = bisect_right(documents.ends, self._at)
        if not done:
            return documents.before.state(self._at)
        return documents.after[done - 1].state(self._at - documents.ends[done - 1])

    def close(self) -> None:
        self._source.close()

    def _last_token(self) -> int:
        """The token before the position: EOS, or a token inside the document at the cursor."""
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
        """Raises a SourceError only when all rows before it are used up, and then each time."""
        while self._error is None:
            before = self._after
            kept: list[Encoded] = []
            after: list[Cursor] = []
            rows, cursors = self._take()
            for row, cursor in zip(self._encode(rows), cursors, strict=True):
                if isinstance(row, Skipped):
                    self._passed[row.reason] += 1
                for reason, count in self._passed.items():
                    cursor = cursor.after_skipping(reason, count, documents=count)
                self._after = cursor
                if isinstance(row, Encoded):
                    kept.append(row)
                    after.append(cursor)
                    self._used_epoch = cursor.epoch
                elif fault := self._fault(row):
                    self._error = fault
                    break
            if kept:
                self._documents = _Documents(before, *joined(kept, self.eos), after)
                return
        raise self._error

    def _take(self) -> tuple[list[Row], list[Cursor]]:
        """The next rows. An error is kept until the rows before it are used up."""
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
        return rows, after

    def _fault(self, skipped: Skipped) -> SourceError | None:
        """The error to raise if too many rows cannot be used, by the counts since the start of the run.

        Only the first epoch is checked, because later epochs contain the same rows.
        """
        if self._passed[skipped.reason] <= NOTES_PER_REASON:
            self.notes.append(f"{skipped.detail}; skipped")
        counts = self._after.skipped_by_reason()
        bad = sum(counts[reason] for reason in ENCODING_REASONS)
        if self._after.epoch == 0 and (
            fault := too_many_records(
                bad, self._after.documents + bad, self.rows.config.max_bad_fraction, skipped.detail
            )
        ):
            return fault
        if self._after.epoch > self._used_epoch + 1:
            return SourceError(
                f"lane {self.rows.plan.lane}: none of its records can be used; "
                f"the last one: {skipped.detail}; lower data.lanes"
            )
        return None


def joined(rows: Sequence[Encoded], eos: int) -> tuple[Tokens, Mask, list[int]]:
    """Joins rows, each followed by an EOS: their tokens, which of these are scored, and where rows end."""
    ends = list(itertools.accumulate(len(row.ids) + 1 for row in rows))
    tokens = np.full(ends[-1], eos, np.int32)
    scored = np.ones(ends[-1], np.bool_)
    for row, end in zip(rows, ends, strict=True):
        begin = end - 1 - len(row.ids)
        tokens[begin : end - 1] = row.ids
        if row.scored is not None:
            scored[begin:end] = with_end(row.scored)
    return tokens, scored, ends


def with_end(scored: Scored) -> Mask:
    """The mask of a row and its EOS, which is scored if the token before it is, so the model learns to end answers."""
    return np.array([*scored, bool(len(scored)) and scored[-1]], np.bool_)
