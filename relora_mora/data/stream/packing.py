"""Packing as a stream: cuts the rows of a lane into token blocks without padding and without losing a token.

The tokens of a lane are EOS, document, EOS, document, EOS, ... Block k is the ``sequence_length + 1`` tokens from
``k * sequence_length`` on. Its last token is also the first of the next block, so every token except the very first is
predicted exactly once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from relora_mora.data.errors import SourceError
from relora_mora.data.lanes import Cursor, LaneRows, LaneStates
from relora_mora.data.rows import Encoded, Scored

if TYPE_CHECKING:
    import torch

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
DocumentIds = npt.NDArray[np.int32]

UNSCORED = -100  # cross entropy's ignore_index


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
    counts: dict[str, int]  # see counts_of; plus the retries of reads
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


class Lane:
    """The blocks of a lane, one after the other. ``state()`` is the position at which the next block begins.

    ``restored`` is an earlier state of this lane. Raises SourceError if the source does not match it. ``notes`` are
    messages about skipped rows; the owner empties the list.
    """

    def __init__(
        self,
        rows: LaneRows[Any],
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
        self._before, self._at = rows.plan.read(restored) if restored else (Cursor(), 0)
        self._after = self._before
        self._source = rows.rows_from(self._before)
        self._tokens = np.empty(0, np.int32)  # of the row between the two cursors, with its EOS
        self._scored = np.empty(0, np.bool_)
        self._last = eos  # the token before the position
        if self._at:
            self._read_row()
            if self._at >= len(self._tokens):
                raise SourceError(
                    f"lane {rows.plan.lane}: the document at the saved position is shorter than it was; "
                    "the source or the tokenizer changed"
                )
            self._last = int(self._tokens[self._at - 1])

    def next_block(self) -> Block:
        """Raises SourceError when a shard has too many bad rows or cannot be read."""
        length = self.sequence_length + 1
        tokens = np.empty(length, np.int32)
        scored = np.empty(length, np.bool_)
        tokens[0] = self._last
        filled = 1
        while filled < length:
            if self._at == len(self._tokens):
                self._read_row()
                self._at = 0
            count = min(length - filled, len(self._tokens) - self._at)
            tokens[filled : filled + count] = self._tokens[self._at : self._at + count]
            scored[filled : filled + count] = self._scored[self._at : self._at + count]
            filled += count
            self._at += count
        self._last = int(tokens[-1])
        inputs = tokens[:-1]
        documents = document_ids(inputs, self.eos) if self.document_mask else np.zeros_like(inputs)
        return Block(tokens, scored[1:], documents)

    def state(self) -> dict[str, Any]:
        return self._before.state(self._at) if self._at < len(self._tokens) else self._after.state(0)

    def close(self) -> None:
        self._source.close()

    def _read_row(self) -> None:
        read = next(self._source, None)
        assert read is not None, "it has ended with an error"
        self._before = self._after
        row, self._after = read
        self._tokens, self._scored = joined([row], self.eos)


def joined(rows: Sequence[Encoded], eos: int) -> tuple[Tokens, Mask]:
    """Joins rows, each followed by an EOS: their tokens, and which of these are scored."""
    length = sum(len(row.ids) + 1 for row in rows)
    tokens = np.full(length, eos, np.int32)
    scored = np.ones(length, np.bool_)
    begin = 0
    for row in rows:
        end = begin + len(row.ids)
        tokens[begin:end] = row.ids
        if row.scored is not None:
            scored[begin : end + 1] = with_end(row.scored)
        begin = end + 1
    return tokens, scored


def with_end(scored: Scored) -> Mask:
    """The mask of a row and its EOS, which is scored if the token before it is, so the model learns to end answers."""
    return np.array([*scored, bool(len(scored)) and scored[-1]], np.bool_)
