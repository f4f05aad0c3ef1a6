"""Packing of rows into blocks: as a stream without padding, or as whole rows next to each other.

Rows that are packed whole are tokenized first (``tokens/make.py``), so their lengths are known, and which rows each
block of an epoch holds is a function of the lengths, the seed and the epoch. Every row is in exactly one block of an
epoch. The lanes take the blocks in turn, so a position is the number of blocks of the epoch that all lanes together
have taken.
"""

import functools
import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from relora_mora.config.data import DataConfig, Packing
from relora_mora.data.columns import open_tokens
from relora_mora.data.errors import SKIP_REASONS, Skipped, SourceError
from relora_mora.data.lanes import Cursor, LaneStates, read_state, seeded_order
from relora_mora.data.records.encoders import Frame, packing_of
from relora_mora.data.rows import Encoded
from relora_mora.data.shard import Shard

if TYPE_CHECKING:
    import torch

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
DocumentIds = npt.NDArray[np.int32]

UNSCORED = -100  # cross entropy's ignore_index
WINDOW_BLOCKS = 16  # whole rows are packed with others of a window of so many blocks; a larger one wastes less room


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


class Block(NamedTuple):
    """``scored[j]`` says whether the prediction of ``tokens[j + 1]`` counts in the loss.

    ``documents`` gives the document number of each input (all tokens but the last); 0 for all if attention may reach
    back to the beginning of the block.
    """

    tokens: Tokens  # [T + 1]
    scored: Mask  # [T]
    documents: DocumentIds  # [T]


def document_ids(input_ids: npt.NDArray[Any], eos: int) -> DocumentIds:
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


def scored_mask(row: Encoded, packing: Packing) -> Mask:
    """Which tokens of a row are predicted and count; in a stream also the EOS after it.

    That is scored if the token before it is, so the model learns to end answers. The first token of a row that is
    packed whole is not scored, since there is no token before it.
    """
    count = len(row.ids)
    mask = np.ones(count + 1, np.bool_)
    if row.scored is not None:
        mask[:-1] = row.scored
        mask[-1] = count > 0 and row.scored[-1]
    if packing == "stream":
        return mask
    mask[:1] = False
    return mask[:count]


def block_of(rows: Sequence[Encoded], *, eos: int, sequence_length: int, fills: bool = True) -> Block:
    """Puts rows next to each other and pads with EOS, which are unscored and a document of their own.

    If each block has one row (``fills`` is false), all inputs are one document.
    """
    tokens = np.full(sequence_length + 1, eos, np.int32)
    scored = np.zeros(sequence_length + 1, np.bool_)
    documents = np.full(sequence_length + 1, len(rows), np.int32)
    begin = 0
    for number, row in enumerate(rows):
        end = begin + len(row.ids)
        tokens[begin:end] = row.ids
        scored[begin:end] = scored_mask(row, "whole")
        documents[begin:end] = number
        begin = end
    return Block(tokens, scored[1:], documents[:-1] if fills else np.zeros(sequence_length, np.int32))


def packed(sizes: Sequence[int], sequence_length: int, *, fills: bool) -> Iterator[list[int]]:
    """The numbers of the rows in each block; a block has at most ``sequence_length + 1`` tokens."""
    if not fills:
        yield from ([number] for number in range(len(sizes)))
        return
    first = 0  # row of the window
    tokens = 0
    for number, size in enumerate(sizes):
        tokens += size
        if tokens >= WINDOW_BLOCKS * sequence_length or number == len(sizes) - 1:
            blocks = first_fit(sizes[first : number + 1], sequence_length + 1)
            yield from ([first + at for at in block] for block in blocks)
            first = number + 1
            tokens = 0


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """The numbers of the rows in each block: from the largest row down, each goes into the first block with room."""
    blocks: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[number]
        at = next((at for at, free in enumerate(left) if free >= size), len(left))
        if at == len(left):
            blocks.append([])
            left.append(room)
        blocks[at].append(number)
        left[at] -= size
    return [sorted(numbers) for numbers in blocks]


class WholeRows:
    """The rows of a source's tokens, and the blocks that they make in each epoch.

    Raises SourceError if no row can be used, or if a file is damaged.
    """

    def __init__(self, shards: Sequence[Shard], config: DataConfig) -> None:
        self.config = config
        self.fills = packing_of(config, shards) == "whole"
        self._files = [open_tokens(shard) for shard in shards]
        specs = [shard.tokens.making for shard in shards if shard.tokens is not None]
        self.eos = specs[0].eos
        self._frames = [
            Frame.of(spec.ends, spec.eos, shard.records, config.sequence_length)
            for spec, shard in zip(specs, shards, strict=True)
        ]
        self._starts = [0, *itertools.accumulate(file.rows for file in self._files)]
        self.left_out = Counter[str]()  # rows that are skipped, or cut, by reason
        lengths = np.concatenate([self._lengths(number) for number in range(len(shards))])
        self._rows = np.flatnonzero(lengths)
        self._sizes = lengths[self._rows]
        self._plan = functools.lru_cache(maxsize=2)(self._plan_epoch)
        if not len(self._rows):
            raise SourceError(
                f"the training data {shards[0].source or shards[0].label} holds no row that can be used "
                f"({self._reasons() or 'it is empty'}); give a source with at least one document, or raise "
                "data.sequence_length if rows are too long"
            )

    def __str__(self) -> str:
        blocks = self.blocks_in(0)
        full = 100 * int(self._sizes.sum()) / (blocks * self.config.sequence_length)
        reasons = self._reasons()
        return f"{len(self._rows):,} records in {blocks:,} sequences, {full:.0f} % full{reasons and f'; {reasons}'}"

    def row(self, number: int) -> Encoded | Skipped:
        """A row as it is packed."""
        file = bisect_right(self._starts, number) - 1
        return self._frames[file].fit(self._files[file].row(number - self._starts[file]))

    def blocks_in(self, epoch: int) -> int:
        return len(self._plan(epoch)[1]) - 1

    def place(self, epoch: int, block: int) -> tuple[int, int]:
        """The epoch, and the block in it, that is ``block`` blocks after the beginning of ``epoch``."""
        while block >= self.blocks_in(epoch):
            block -= self.blocks_in(epoch)
            epoch += 1
        return epoch, block

    def rows_of(self, epoch: int, block: int) -> list[Encoded]:
        numbers, begins = self._plan(epoch)
        rows = map(self.row, numbers[begins[block] : begins[block + 1]].tolist())
        return [row for row in rows if isinstance(row, Encoded)]

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _plan_epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The numbers of the rows, block after block, and where each block begins among them."""
        order = np.array(seeded_order(len(self._rows), self.config.seed, epoch))
        blocks = list(packed(self._sizes[order].tolist(), self.config.sequence_length, fills=self.fills))
        shuffled = [blocks[at] for at in seeded_order(len(blocks), self.config.seed, epoch, 1)]
        places = np.fromiter(itertools.chain.from_iterable(shuffled), np.int64, len(order))
        return self._rows[order[places]], np.cumsum([0, *map(len, shuffled)])

    def _lengths(self, number: int) -> npt.NDArray[np.int64]:
        """The number of tokens of each row of a file, 0 if it is left out."""
        frame = self._frames[number]
        lengths = self._files[number].lengths() + len(frame.begin) + len(frame.end)
        for at, reason in self._files[number].skipped():
            lengths[at] = 0
            self.left_out[reason] += 1
        for at in np.flatnonzero(lengths > frame.most).tolist():
            row = self.row(self._starts[number] + at)
            self.left_out[row.reason if isinstance(row, Skipped) else "cut"] += 1
            lengths[at] = 0 if isinstance(row, Skipped) else frame.most
        return lengths

    def _reasons(self) -> str:
        return "; ".join(f"{reason}: {self.left_out[reason]:,}" for reason in SKIP_REASONS if self.left_out[reason])


@dataclass
class WholeLane:
    """As ``lane.Lane``, for whole rows: one of ``lanes`` lanes. ``restored`` is an earlier state of this lane.

    The first lane's counts include the rows of the source that are left out.
    """

    rows: WholeRows
    lane: int
    lanes: int
    restored: InitVar[Mapping[str, Any] | None] = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self, restored: Mapping[str, Any] | None) -> None:
        self._cursor = read_state(restored)[0] if restored else Cursor()

    def next_block(self) -> Block:
        whole = self.rows
        cursor = self._cursor
        rows = whole.rows_of(*whole.place(cursor.epoch, cursor.block + self.lane))
        epoch, block = whole.place(cursor.epoch, cursor.block + self.lanes)
        left_out = dict(whole.left_out) if self.lane == 0 else {}
        documents = cursor.documents + len(rows)
        self._cursor = Cursor(epoch=epoch, block=block, documents=documents, skipped=left_out)
        return block_of(rows, eos=whole.eos, sequence_length=whole.config.sequence_length, fills=whole.fills)

    def state(self) -> dict[str, Any]:
        return self._cursor.state(0)

    def close(self) -> None:
        self.rows.close()
