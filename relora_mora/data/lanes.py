"""A lane's rows: its own share of the shards, shuffled in blocks, endlessly, one epoch after the other."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Generic

import numpy as np

from relora_mora.config import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.lane_states import Cursor, read_state
from relora_mora.data.rows import OpenRows, Row
from relora_mora.data.skipped import Skipped
from relora_mora.data.sources import Shard


@dataclass(frozen=True)
class LanePlan:
    """What a lane reads: its share of each of its shards, which is one of ``stride``, the one numbered ``phase``."""

    lane: int
    shards: tuple[int, ...]  # numbers in the list of shards
    stride: int
    phase: int

    def order(self, seed: int, epoch: int) -> list[int]:
        """The numbers of its shards in the order of an epoch."""
        return [self.shards[at] for at in seeded_order(len(self.shards), seed, self.lane, epoch)]

    def read(self, state: Mapping[str, Any]) -> tuple[Cursor, int]:
        """(cursor, offset in tokens) of this lane's saved state. Raises SourceError for one that cannot be its own."""
        cursor, offset = read_state(state)
        if cursor.place >= len(self.shards):
            raise SourceError(
                f"lane {self.lane}: the saved position is beyond its {len(self.shards)} shards; "
                "resume with the same sources"
            )
        return cursor, offset


def plan_lanes(lanes: int, shards: int) -> list[LanePlan]:
    """Every row of every shard belongs to exactly one lane.

    With at least as many shards as lanes, lane l reads the shards l, l + lanes, ...; with fewer, it shares shard
    ``l mod shards`` with the other lanes that fall on it, each taking every n-th row where n is their number.
    """
    if shards >= lanes:
        return [LanePlan(lane, tuple(range(lane, shards, lanes)), 1, 0) for lane in range(lanes)]
    sharing = [len(range(shard, lanes, shards)) for shard in range(shards)]
    return [LanePlan(lane, (lane % shards,), sharing[lane % shards], lane // shards) for lane in range(lanes)]


def seeded_order(count: int, *key: int) -> list[int]:
    """A permutation of ``range(count)`` that depends on the key alone, on every machine and numpy version.

    The raw stream of numpy's PCG64 is part of its compatibility promise; ``Generator.permutation`` is not.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable").tolist()


@dataclass
class LaneRows(Generic[Row]):
    """``rows_from(cursor)`` gives (row, the cursor behind it), from any cursor that it gave before or that was saved.

    Of ``config`` the seed and ``shuffle_documents`` count; what a shard is read with stands in ``open_rows``.
    """

    plan: LanePlan
    shards: Sequence[Shard]
    config: DataConfig
    open_rows: OpenRows[Row]
    notes: list[str] = field(default_factory=list)  # skipped rows to tell about; the owner empties it

    def rows_from(self, cursor: Cursor) -> Generator[tuple[Row, Cursor], None, None]:
        """Endless. Raises SourceError where a shard cannot be read or has too many bad rows, or there is no text."""
        while True:
            order = self.plan.order(self.config.seed, cursor.epoch)
            epoch_start = cursor
            for place in range(cursor.place, len(order)):
                cursor = yield from self._rows_of_shard(order[place], cursor)
                cursor = cursor._replace(place=place + 1, block=0, item=0, bad=0)
            was_whole = (epoch_start.place, epoch_start.block, epoch_start.item) == (0, 0, 0)
            if was_whole and cursor.documents == epoch_start.documents:
                raise SourceError(
                    f"lane {self.plan.lane} found no text in "
                    f"{', '.join(self.shards[shard].name for shard in self.plan.shards[:3])}: "
                    "there are fewer documents than lanes; give more text or lower data.lanes"
                )
            cursor = cursor._replace(epoch=cursor.epoch + 1, place=0)

    def _rows_of_shard(self, number: int, cursor: Cursor) -> Generator[tuple[Row, Cursor], None, Cursor]:
        """The rows of a shard from the cursor on; returns the cursor at its end."""
        shard = self.shards[number]
        size = self.config.shuffle_documents
        opened = self.open_rows(
            shard, stride=self.plan.stride, phase=self.plan.phase, bad=cursor.bad, note=self.notes.append
        )
        with closing(opened) as rows:
            if not rows.skip(cursor.block * size):
                raise self._became_shorter(shard)
            block = rows.take(size)
            if cursor.item > len(block):
                raise self._became_shorter(shard)
            while block:
                order = seeded_order(len(block), self.config.seed, self.plan.lane, cursor.epoch, number, cursor.block)
                remaining = [block[at] for at in reversed(order[cursor.item :])]
                block.clear()  # large, as text: with this each row is freed as soon as it is used
                while remaining:
                    row = remaining.pop()
                    if isinstance(row, Skipped):
                        cursor = cursor._replace(item=cursor.item + 1).after_skipping(row.reason)
                    else:
                        cursor = cursor.after_document()
                        yield row, cursor
                bad_before = rows.bad
                block = rows.take(size)
                if block:
                    cursor = cursor._replace(block=cursor.block + 1, item=0, bad=bad_before)
            return cursor.after_skipping("empty_shard") if rows.is_empty else cursor

    def _became_shorter(self, shard: Shard) -> SourceError:
        return SourceError(
            f"lane {self.plan.lane}: {shard.name} has fewer lines than when its position was saved; "
            "resume with the same files"
        )
