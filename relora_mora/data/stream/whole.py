"""Packing of whole rows: as many as fit into a block, or one in each. The rest of a block is padded.

The rows of a lane are taken in groups, and each group is packed into blocks by itself: a row that does not fit into one
block goes into another block of its group. A group ends when its tokens fill at least ``GROUP_BLOCKS`` blocks, and at
the end of an epoch, so an epoch consists of whole blocks. A position is the beginning of a group, and how many of its
blocks and rows were produced.

Lanes have unequal numbers of blocks. If the largest number of each epoch is known (``reading.py``), a lane that has
finished an epoch produces blocks without rows until the others have finished it too, so all lanes begin an epoch
together.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic

import numpy as np

from relora_mora.data.errors import SourceError
from relora_mora.data.lanes import Cursor, EpochsReached, LaneRows, seeded_order
from relora_mora.data.rows import Encode, Encoded, Row
from relora_mora.data.stream.encoded_rows import EncodedRows
from relora_mora.data.stream.packing import Block

GROUP_BLOCKS = 16  # a larger group wastes less room but makes a resume repeat more


def of_epoch(numbers: Sequence[int], epoch: int) -> int:
    """The entry for an epoch (from 0). ``numbers`` covers the first epochs; the last one also applies later."""
    return numbers[min(epoch, len(numbers) - 1)]


class PackedLane(Generic[Row]):
    """A ``packing.Packer`` of whole rows: as many per block as fit if ``fills``, otherwise one.

    ``epoch_blocks`` is the number of blocks that each epoch takes from every lane; None if each lane begins its next
    epoch immediately. ``restored`` is an earlier state of this lane. A lane that has begun keeps the numbers in its
    state, unless ``epoch_blocks`` extends them. Raises SourceError if the source does not match ``restored``.
    """

    def __init__(
        self,
        rows: LaneRows[Row],
        encode: Encode[Row],
        *,
        eos: int,
        sequence_length: int,
        fills: bool,
        epoch_blocks: Sequence[int] | None = None,
        restored: Mapping[str, Any] | None = None,
    ) -> None:
        self.rows = rows
        self.eos = eos
        self.sequence_length = sequence_length
        self.fills = fills
        self._epoch_blocks = epoch_blocks
        self._turn = 0  # blocks produced in this epoch
        cursor = Cursor()
        produced = 0
        if restored:
            cursor, produced = rows.plan.read(restored)
            if produced or cursor != Cursor() or "turn" in restored:  # the lane has begun
                saved = restored.get("epoch_blocks")
                if saved is None or epoch_blocks is None or list(epoch_blocks[: len(saved)]) != saved:
                    self._epoch_blocks = saved
                self._turn = restored.get("turn", 0)
            cursor = cursor._replace(documents=cursor.documents - restored.get("documents_given", 0))
        self.encoded = EncodedRows(rows, encode, cursor)
        self._waiting: deque[tuple[Encoded, Cursor]] = deque()
        self._before = cursor  # positions before and after the group
        self._after = cursor
        self._epoch = cursor.epoch
        self._blocks: list[list[Encoded]] = []  # the rows of each block of the group
        self._produced = 0  # blocks of the group that were produced
        if produced:
            self._next_group()
            if produced >= len(self._blocks):
                raise SourceError(
                    f"lane {rows.plan.lane}: there are fewer records at the saved position than when it was saved; "
                    "the source or the tokenizer changed"
                )
            self._produced = produced

    def next_block(self) -> Block:
        if self._produced == len(self._blocks):
            if self._waits():
                self._turn += 1
                return self._block([])
            self._next_group()
        self._produced += 1
        self._turn += 1
        return self._block(self._blocks[self._produced - 1])

    def state(self) -> dict[str, Any]:
        turn = {} if self._epoch_blocks is None else {"epoch_blocks": list(self._epoch_blocks), "turn": self._turn}
        if self._produced == len(self._blocks):
            return {**self._after.state(0), **turn}
        documents = sum(map(len, self._blocks[: self._produced]))
        before = self._before._replace(documents=self._before.documents + documents)
        return {**before.state(self._produced), "documents_given": documents, **turn}

    def close(self) -> None:
        self.encoded.close()

    def _waits(self) -> bool:
        """At the end of a group: whether this lane has finished its epoch, and other lanes may not have."""
        if self._epoch_blocks is None or self._goes_on(self._epoch):
            return False
        blocks = of_epoch(self._epoch_blocks, self._epoch)
        if self._turn < blocks:
            return True
        self._turn -= blocks
        return False

    def _block(self, rows: Sequence[Encoded]) -> Block:
        return block_of(rows, eos=self.eos, sequence_length=self.sequence_length, fills=self.fills)

    def _next_group(self) -> None:
        before = self._after
        group = [self._next_row()]
        epoch = group[0][1].epoch
        self._epoch = epoch
        tokens = len(group[0][0].ids)
        while self.fills and tokens < GROUP_BLOCKS * self.sequence_length and self._goes_on(epoch):
            group.append(self._next_row())
            tokens += len(group[-1][0].ids)
        self._before = before
        self._after = group[-1][1]
        self._produced = 0
        key = (self.rows.config.seed, self.rows.plan.lane, epoch, before.place, before.block, before.item)
        blocks = packed([row for row, _ in group], self.sequence_length, fills=self.fills)
        self._blocks = [blocks[at] for at in seeded_order(len(blocks), *key)]

    def _next_row(self) -> tuple[Encoded, Cursor]:
        self._look_ahead()
        return self._waiting.popleft()

    def _goes_on(self, epoch: int) -> bool:
        """Whether this epoch has another row. At the end of the last epoch it has none; the next group raises that.

        Any other error is raised here, before the group ends: a shorter group would give other blocks than a resume.
        """
        try:
            self._look_ahead()
        except EpochsReached:
            return False
        return self._waiting[0][1].epoch == epoch

    def _look_ahead(self) -> None:
        if not self._waiting:
            _, rows, after = self.encoded.next_group()
            self._waiting.extend(zip(rows, after, strict=True))


class CountedLane(PackedLane[Row]):
    """Counts the blocks of a lane. ``tokens`` is the number of tokens in the rows of the first epoch."""

    tokens = 0

    def epoch_blocks(self, epochs: int) -> list[int]:
        """The number of blocks in each of the first epochs. Call it at the start of the lane; it reads these epochs."""
        blocks = [0] * epochs
        self._next_group()
        while self._epoch < epochs:
            blocks[self._epoch] += len(self._blocks)
            if self._epoch == 0:
                self.tokens += sum(len(row.ids) for rows in self._blocks for row in rows)
            self._next_group()
        return blocks


def groups_of(rows: Sequence[Encoded], sequence_length: int) -> Iterator[list[Encoded]]:
    """Splits rows into groups as a lane does."""
    group: list[Encoded] = []
    tokens = 0
    for row in rows:
        group.append(row)
        tokens += len(row.ids)
        if tokens >= GROUP_BLOCKS * sequence_length:
            yield group
            group = []
            tokens = 0
    if group:
        yield group


def packed(rows: Sequence[Encoded], sequence_length: int, *, fills: bool) -> list[list[Encoded]]:
    """The rows of each block; a block has at most ``sequence_length + 1`` tokens."""
    if not fills:
        return [[row] for row in rows]
    blocks = first_fit([len(row.ids) for row in rows], sequence_length + 1)
    return [[rows[number] for number in numbers] for numbers in blocks]


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """The numbers of the rows in each block: from the largest row down, each goes into the first block with room."""
    blocks: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[number]
        at = next((at for at, free in enumerate(left) if free >= size), len(left))
        if at == len(left):
            blocks.append([])
            left.append(room)
        blocks[at].append(number)
        left[at] -= size
    return [sorted(numbers) for numbers in blocks]


def block_of(rows: Sequence[Encoded], *, eos: int, sequence_length: int, fills: bool = True) -> Block:
    """Puts rows next to each other and pads with EOS, which are unscored and a document of their own.

    The first token of a row is not scored either, since there is no token before it. If each block has one row
    (``fills`` is false), documents are not numbered.
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
    return Block(tokens, scored[1:], documents[:-1] if fills else None)
