"""A lane's rows: its own share of the shards, shuffled in blocks, endlessly, one epoch after the other."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple

import numpy as np

from relora_mora.config.data import DataConfig, Packing
from relora_mora.data.errors import SKIP_REASONS, Skipped, SourceError
from relora_mora.data.lane_states import Cursor, read_state
from relora_mora.data.rows import OpenRows, Row
from relora_mora.data.shard import Shard


class Part(NamedTuple):
    """What a lane reads of a shard: its rows ``phase``, ``phase + stride``, ..., in the way of the shard's format."""

    shard: int  # number in the list of shards
    stride: int = 1
    phase: int = 0


@dataclass(frozen=True)
class LanePlan:
    """What a lane reads in every epoch."""

    lane: int
    parts: tuple[Part, ...]

    def order(self, seed: int, epoch: int) -> list[Part]:
        """Its parts in the order of an epoch."""
        return [self.parts[at] for at in seeded_order(len(self.parts), seed, self.lane, epoch)]

    def read(self, state: Mapping[str, Any]) -> tuple[Cursor, int]:
        """(cursor, offset in tokens) of this lane's saved state. Raises SourceError for one that cannot be its own."""
        cursor, offset = read_state(state)
        if cursor.place >= len(self.parts):
            raise SourceError(
                f"lane {self.lane}: the saved position is beyond its {len(self.parts)} shards; "
                "resume with the same sources"
            )
        return cursor, offset


def plan_lanes(lanes: int, shards: int, *, whole: bool = False, even: bool = False) -> list[LanePlan]:
    """Every row of every shard belongs to exactly one lane.

    Lane l reads the shards l, l + lanes, ..., as long as there is one for each lane. The lanes share those that are
    left, or all where there are fewer than lanes: of n shards lane l reads a part of the one numbered ``l mod n``. With
    ``whole`` nobody shares what is left: some lanes read a shard more than others. With ``even`` fewer shards than
    lanes are each shared by all of these, so that all have as many rows.
    """
    if even and shards < lanes:
        shares = [[Part(shard, lanes, (lane + shard) % lanes) for shard in range(shards)] for lane in range(lanes)]
        return [LanePlan(lane, tuple(parts)) for lane, parts in enumerate(shares)]
    left = shards if shards < lanes else 0 if whole else shards % lanes
    alone = shards - left
    parts = [[Part(shard) for shard in range(lane, alone, lanes)] for lane in range(lanes)]
    for lane in range(lanes if left else 0):
        first = lane % left
        parts[lane].append(Part(alone + first, stride=len(range(first, lanes, left)), phase=lane // left))
    return [LanePlan(lane, tuple(parts[lane])) for lane in range(lanes)]


def lane_plans(config: DataConfig, lanes: int, shards: int, packing: Packing) -> list[LanePlan]:
    """How the lanes of a run share shards whose rows become sequences like this."""
    even = packing != "stream" or config.concatenate
    return plan_lanes(lanes, shards, even=even)


def seeded_order(count: int, *key: int) -> list[int]:
    """A permutation of ``range(count)`` that depends on the key alone, on every machine and numpy version.

    The raw stream of numpy's PCG64 is part of its compatibility promise; ``Generator.permutation`` is not.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable").tolist()


class EpochsReached(SourceError):
    """A source has been read as often as it may be."""


@dataclass(frozen=True)
class EpochLimit:
    """How often a source may be read."""

    source: str
    epochs: int
    stops: bool

    @property
    def reached(self) -> str:
        times = "once" if self.epochs == 1 else f"{self.epochs} times"
        return f"the source {self.source} has been read {times}, its max_epochs"

    def check(self, epoch: int) -> None:
        """Before an epoch, from 0. Raises EpochsReached where it may not be read."""
        if self.stops and epoch >= self.epochs:
            raise EpochsReached(
                f"{self.reached}; give it less weight, more text or a higher max_epochs, train for fewer steps, "
                "or set at_max_epochs: warn"
            )


@dataclass
class LaneRows(Generic[Row]):
    """``rows_from(cursor)`` gives (row, the cursor behind it), from any cursor that it gave before or that was saved.

    Of ``config`` the seed and ``shuffle_documents`` count; what a shard is read with stands in ``open_rows``.
    """

    plan: LanePlan
    shards: Sequence[Shard]
    config: DataConfig
    open_rows: OpenRows[Row]
    limit: EpochLimit | None = None
    notes: list[str] = field(default_factory=list)  # skipped rows to tell about; the owner empties it

    def rows_from(self, cursor: Cursor) -> Generator[tuple[Row, Cursor], None, None]:
        """Endless. Raises SourceError where a shard cannot be read or has too many bad rows, or there is no text."""
        while True:
            if self.limit is not None:
                self.limit.check(cursor.epoch)
            order = self.plan.order(self.config.seed, cursor.epoch)
            epoch_start = cursor
            for place in range(cursor.place, len(order)):
                cursor = yield from self._rows_of_part(order[place], cursor)
                cursor = cursor._replace(place=place + 1, block=0, item=0, bad=0)
            was_whole = (epoch_start.place, epoch_start.block, epoch_start.item) == (0, 0, 0)
            if was_whole and cursor.documents == epoch_start.documents:
                raise self._no_text(epoch_start, cursor)
            cursor = cursor._replace(epoch=cursor.epoch + 1, place=0)

    def _rows_of_part(self, part: Part, cursor: Cursor) -> Generator[tuple[Row, Cursor], None, Cursor]:
        """The rows of a part from the cursor on; returns the cursor at its end."""
        shard = self.shards[part.shard]
        size = self.config.shuffle_documents
        opened = self.open_rows(shard, stride=part.stride, phase=part.phase, bad=cursor.bad, note=self.notes.append)
        with closing(opened) as rows:
            if not rows.skip(cursor.block * size):
                raise self._became_shorter(shard)
            block = rows.take(size)
            if cursor.item > len(block):
                raise self._became_shorter(shard)
            while block:
                key = (self.config.seed, self.plan.lane, cursor.epoch, part.shard, cursor.block)
                order = seeded_order(len(block), *key)
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

    def _no_text(self, before: Cursor, now: Cursor) -> SourceError:
        passed = zip(SKIP_REASONS, before.skipped, now.skipped, strict=True)
        skipped = [f"{reason}: {to - was}" for reason, was, to in passed if to > was and reason != "empty_shard"]
        shards = ", ".join(self.shards[part.shard].label for part in self.plan.parts[:3])
        why = (
            f"all of its rows were skipped ({', '.join(skipped)})"
            if skipped
            else "there are fewer documents than lanes"
        )
        remedy = "give more text or lower data.lanes"
        if self.config.is_mixture:
            remedy += (
                f", or give its source {self.shards[0].source} no weight in data.train and data.stages; a run that has "
                "begun can do this with --train.allow_changes=[data.train,data.stages]"
            )
        return SourceError(f"lane {self.plan.lane} found no text in {shards}: {why}; {remedy}")

    def _became_shorter(self, shard: Shard) -> SourceError:
        return SourceError(
            f"lane {self.plan.lane}: {shard.label} has fewer lines than when its position was saved; "
            "resume with the same files; another data.seed reads other text of the same names from its beginning"
        )
