"""Packing of whole rows: as many as fit into a block, or one in each. The rest of a block is padded.

The rows are tokenized first (``tokens/make.py``), so their lengths are known, and which rows each block of an epoch
holds is a function of the lengths, the seed and the epoch. Every row is in exactly one block of an epoch. The lanes
take the blocks in turn, so a position is the number of blocks of the epoch that all lanes together have taken.
"""

import functools
import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from relora_mora.config.data import DataConfig, TextSource
from relora_mora.data.errors import SKIP_REASONS, Skipped, SourceError
from relora_mora.data.lanes import Cursor, check_epoch, read_state, seeded_order
from relora_mora.data.records.encoders import Frame, packing_of
from relora_mora.data.rows import Encoded
from relora_mora.data.shard import Shard
from relora_mora.data.stream.packing import Block
from relora_mora.data.tokens.rows import open_tokens

WINDOW_BLOCKS = 16  # rows are packed with others of a window of so many blocks; a larger one wastes less room


class _Plan(NamedTuple):
    """The blocks of an epoch."""

    rows: npt.NDArray[np.int64]  # block after block
    ends: npt.NDArray[np.int64]  # of each block, in rows


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
        row = self._files[file].row(number - self._starts[file])
        return row if isinstance(row, Skipped) else self._frames[file].fit(row)

    def blocks_in(self, epoch: int) -> int:
        return len(self._plan(epoch).ends)

    def place(self, epoch: int, block: int) -> tuple[int, int]:
        """The epoch, and the block in it, that is ``block`` blocks after the beginning of ``epoch``."""
        while block >= self.blocks_in(epoch):
            block -= self.blocks_in(epoch)
            epoch += 1
        return epoch, block

    def rows_of(self, epoch: int, block: int) -> list[Encoded]:
        rows, ends = self._plan(epoch)
        numbers = rows[ends[block - 1] if block else 0 : ends[block]].tolist()
        return [row for row in map(self.row, numbers) if isinstance(row, Encoded)]

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _plan_epoch(self, epoch: int) -> _Plan:
        order = np.array(seeded_order(len(self._rows), self.config.seed, epoch))
        sizes = self._sizes[order].tolist()
        blocks = list(packed(sizes, self.config.sequence_length, fills=self.fills))
        shuffled = [blocks[at] for at in seeded_order(len(blocks), self.config.seed, epoch, 1)]
        places = np.fromiter(itertools.chain.from_iterable(shuffled), np.int64, len(sizes))
        return _Plan(self._rows[order[places]], np.cumsum([len(block) for block in shuffled]))

    def _lengths(self, number: int) -> npt.NDArray[np.int64]:
        """The number of tokens of each row of a file, 0 if it is left out."""
        frame = self._frames[number]
        first = self._starts[number]
        parts = [np.zeros(0, np.int64)]
        for batch in self._files[number].batches():
            lengths = np.diff(batch.offsets).astype(np.int64) + len(frame.begin) + len(frame.end)
            lengths[list(batch.skipped)] = 0
            self.left_out.update(batch.skipped.values())
            for at in np.flatnonzero(lengths > frame.most):
                row = self.row(first + int(at))
                self.left_out[row.reason if isinstance(row, Skipped) else "cut"] += 1
                lengths[at] = 0 if isinstance(row, Skipped) else frame.most
            parts.append(lengths)
            first += len(lengths)
        return np.concatenate(parts)

    def _reasons(self) -> str:
        return "; ".join(f"{reason}: {self.left_out[reason]:,}" for reason in SKIP_REASONS if self.left_out[reason])


class WholeLane:
    """As ``packing.Lane``, for whole rows: one of ``lanes`` lanes. ``restored`` is an earlier state of this lane.

    The first lane's counts include the rows of the source that are left out.
    """

    def __init__(
        self,
        rows: WholeRows,
        lane: int,
        lanes: int,
        source: TextSource | None = None,
        restored: Mapping[str, Any] | None = None,
    ) -> None:
        self.notes: list[str] = []
        self._rows = rows
        self._lane = lane
        self._lanes = lanes
        self._source = source
        self._cursor = read_state(restored)[0] if restored else Cursor()

    def next_block(self) -> Block:
        whole = self._rows
        cursor = self._cursor
        epoch, block = whole.place(cursor.epoch, cursor.block + self._lane)
        check_epoch(self._source, epoch)
        rows = whole.rows_of(epoch, block)
        epoch, block = whole.place(cursor.epoch, cursor.block + self._lanes)
        left_out = whole.left_out if self._lane == 0 else {}
        self._cursor = Cursor(
            epoch=epoch,
            block=block,
            documents=cursor.documents + len(rows),
            skipped=tuple(left_out.get(reason, 0) for reason in SKIP_REASONS),
        )
        return block_of(rows, eos=whole.eos, sequence_length=whole.config.sequence_length, fills=whole.fills)

    def state(self) -> dict[str, Any]:
        return self._cursor.state(0)

    def close(self) -> None:
        self._rows.close()


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
        for at, free in enumerate(left):
            if free >= size:
                blocks[at].append(number)
                left[at] -= size
                break
        else:
            blocks.append([number])
            left.append(room - size)
    return [sorted(numbers) for numbers in blocks]


def block_of(rows: Sequence[Encoded], *, eos: int, sequence_length: int, fills: bool = True) -> Block:
    """Puts rows next to each other and pads with EOS, which are unscored and a document of their own.

    The first token of a row is not scored either, since there is no token before it. If each block has one row
    (``fills`` is false), all inputs are one document.
    """
    tokens = np.full(sequence_length + 1, eos, np.int32)
    scored = np.zeros(sequence_length + 1, np.bool_)
    documents = np.full(sequence_length + 1, len(rows), np.int32)
    begin = 0
    for number, row in enumerate(rows):
        end = begin + len(row.ids)
        tokens[begin:end] = row.ids
        scored[begin + 1 : end] = True if row.scored is None else row.scored[1:]
        documents[begin:end] = number
        begin = end
    return Block(tokens, scored[1:], documents[:-1] if fills else np.zeros(sequence_length, np.int32))
