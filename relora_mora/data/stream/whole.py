"""Packing of whole rows: as many as fit into a block, or one in each. The rest of a block is padded.

The rows are tokenized first (``tokens/make.py``), so their lengths are known, and which rows each block of an epoch
holds is a function of the lengths, the seed and the epoch. Every row is in exactly one block of an epoch. The lanes
take the blocks in turn, so a position is the number of blocks of the epoch that all lanes together have taken.
"""

import functools
import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import SKIP_REASONS, Skipped, SourceError
from relora_mora.data.lanes import Cursor, read_state, seeded_order
from relora_mora.data.records.encoders import Frame, packing_of
from relora_mora.data.rows import Encoded
from relora_mora.data.shard import Shard
from relora_mora.data.stream.packing import Block, block_of, packed
from relora_mora.data.tokens.rows import open_tokens


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


class WholeLane:
    """As ``lane.Lane``, for whole rows: one of ``lanes`` lanes. ``restored`` is an earlier state of this lane.

    The first lane's counts include the rows of the source that are left out.
    """

    def __init__(self, rows: WholeRows, lane: int, lanes: int, restored: Mapping[str, Any] | None = None) -> None:
        self.notes: list[str] = []
        self._rows = rows
        self._lane = lane
        self._lanes = lanes
        self._cursor = read_state(restored)[0] if restored else Cursor()

    def next_block(self) -> Block:
        whole = self._rows
        cursor = self._cursor
        rows = whole.rows_of(*whole.place(cursor.epoch, cursor.block + self._lane))
        epoch, block = whole.place(cursor.epoch, cursor.block + self._lanes)
        left_out = dict(whole.left_out) if self._lane == 0 else {}
        documents = cursor.documents + len(rows)
        self._cursor = Cursor(epoch=epoch, block=block, documents=documents, skipped=left_out)
        return block_of(rows, eos=whole.eos, sequence_length=whole.config.sequence_length, fills=whole.fills)

    def state(self) -> dict[str, Any]:
        return self._cursor.state(0)

    def close(self) -> None:
        self._rows.close()
