"""A lane reads and tokenizes its own share of the shards, shuffled in blocks, epoch after epoch without end.

Its position is a handful of numbers, which checkpoints store.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from relora_mora.config.data import DataConfig, TextSource
from relora_mora.data.errors import BAD_REASONS, ENCODING_REASONS, SKIP_REASONS, Skipped, SourceError
from relora_mora.data.rows import (
    NOTES_PER_REASON,
    Encode,
    Encoded,
    OpenRows,
    Row,
    in_calls,
    too_many_records,
)
from relora_mora.data.shard import Shard

LaneStates = dict[str, dict[str, Any]]  # by ``state_key``, which is a string because JSON has no other keys
T = TypeVar("T")
# limits of a call of the tokenizer: enough to make it cheap, and little enough that a resume repeats little
ENCODE_ROWS = 64
ENCODE_CHARACTERS = 1 << 15


class Cursor(NamedTuple):
    """A position just before a row of a lane, with the counts of rows that were passed to get there."""

    epoch: int = 0
    place: int = 0  # in the lane's shard order of this epoch
    block: int = 0  # of shuffled rows within the shard
    item: int = 0  # in the block's shuffled order
    bad: int = 0  # bad own rows of the shard before the block
    documents: int = 0  # finished since the start of the run
    skipped: tuple[int, ...] = (0,) * len(SKIP_REASONS)  # per reason, since the start of the run

    def after_document(self) -> "Cursor":
        """The position after the document at this place, in the same block."""
        # _replace would take three times as long, and this is called for every document
        return Cursor(self.epoch, self.place, self.block, self.item + 1, self.bad, self.documents + 1, self.skipped)

    def after_skipping(self, reason: str) -> "Cursor":
        """The same place with one more skipped row."""
        at = SKIP_REASONS.index(reason)
        return self._replace(skipped=(*self.skipped[:at], self.skipped[at] + 1, *self.skipped[at + 1 :]))

    def skipped_by_reason(self) -> dict[str, int]:
        return dict(zip(SKIP_REASONS, self.skipped, strict=True))

    def state(self, offset: int) -> dict[str, Any]:
        """The JSON-able state in a checkpoint. The lane is ``offset`` tokens into the document at the cursor."""
        skipped = {}
        if any(self.skipped):  # usually there are none, and this is called for every batch
            skipped = {reason: count for reason, count in self.skipped_by_reason().items() if count}
        return {**self._asdict(), "skipped": skipped, "offset": offset}


def read_state(state: Mapping[str, Any]) -> tuple[Cursor, int]:
    """(cursor, offset in tokens) from a lane's saved state. Raises SourceError if it is not such a state."""
    try:
        position = {name: state[name] for name in Cursor._fields if name != "skipped"}
        offset = state["offset"]
        skipped = dict(state["skipped"])
        counts = [*position.values(), offset, *skipped.values()]
        if any(type(count) is not int or count < 0 for count in counts) or not set(skipped) <= set(SKIP_REASONS):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise SourceError(
            f"the saved position of a data lane cannot be read: {state!r:.200}; resume from an undamaged checkpoint"
        ) from None
    return Cursor(**position, skipped=tuple(skipped.get(reason, 0) for reason in SKIP_REASONS)), offset


def state_key(lane: int, source: str) -> str:
    """The key of a lane's state. In a mixture, whose sources have names, a lane has one state per source."""
    return f"{lane}/{source}" if source else str(lane)


def read_key(key: str) -> tuple[int, str]:
    """(lane, source) from a key."""
    lane, _, source = key.partition("/")
    return int(lane), source


def check_states(states: Mapping[str, Mapping[str, Any]], lanes: int, sources: Sequence[str] = ("",)) -> None:
    """Raises SourceError unless ``states`` holds one state per lane and source of a run."""
    if set(states) != {state_key(lane, source) for lane in range(lanes) for source in sources}:
        saved = len({key.partition("/")[0] for key in states})
        raise SourceError(
            f"the saved data state has {saved} lanes, this run has {lanes}; "
            f"set data.lanes to {saved} (and train.batch_size to a multiple of it)"
            if saved != lanes
            else "the saved data state belongs to other sources; use the names in data.train that the run started with"
        )
    for state in states.values():
        read_state(state)


def start_states(lanes: int, sources: Sequence[str] = ("",)) -> LaneStates:
    """The states of all lanes before their first block."""
    return {
        state_key(lane, source): Cursor().state(offset=0) | ({"blocks": 0} if source else {})
        for lane in range(lanes)
        for source in sources
    }


def merge_states(states: Iterable[Mapping[str, Mapping[str, Any]]]) -> LaneStates:
    """Joins the ``Batch.state`` of all ranks at one step. Raises ValueError if two of them hold the same lane."""
    merged: LaneStates = {}
    for state in states:
        for key, lane_state in state.items():
            if key in merged:
                raise ValueError(
                    f"lane {key} is in the data state of two ranks; merge the states of different ranks at one step"
                )
            merged[key] = dict(lane_state)
    return dict(sorted(merged.items(), key=lambda item: read_key(item[0])))


def counts_of(states: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Totals over the given lanes since the start of the run. The totals of several ranks can be added.

    The keys are ``documents``, ``epoch``, ``bad`` (all bad rows) and ``skipped/<reason>`` for every reason of
    ``SKIP_REASONS``, in that order and even if it is 0. A mixture adds ``blocks/<name>`` and ``epoch/<name>`` for each
    source. An epoch is not a total, but the epoch of the least advanced lane.
    """
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for key, state in states.items():
        by_source.setdefault(read_key(key)[1], []).append(state)
    source_counts = {}
    for source in sorted(by_source.keys() - {""}):
        source_counts[f"blocks/{source}"] = sum(state["blocks"] for state in by_source[source])
        source_counts[f"epoch/{source}"] = min(state["epoch"] for state in by_source[source])
    skipped = {reason: sum(state["skipped"].get(reason, 0) for state in states.values()) for reason in SKIP_REASONS}
    return {
        "documents": sum(state["documents"] for state in states.values()),
        "epoch": min(state["epoch"] for state in states.values()),
        "bad": sum(skipped[reason] for reason in BAD_REASONS),
        **{f"skipped/{reason}": count for reason, count in skipped.items()},
        **source_counts,
    }


class Part(NamedTuple):
    """A lane's share of a shard: one of ``stride``, in turn or a range of rows, as the shard's format has it."""

    shard: int  # number in the list of shards
    stride: int = 1
    phase: int = 0


@dataclass(frozen=True)
class LanePlan:
    """The parts that a lane reads in every epoch."""

    lane: int
    parts: tuple[Part, ...]

    def order(self, seed: int, epoch: int) -> list[Part]:
        """The parts in the order of an epoch."""
        return [self.parts[at] for at in seeded_order(len(self.parts), seed, self.lane, epoch)]

    def read(self, state: Mapping[str, Any]) -> tuple[Cursor, int]:
        """(cursor, offset in tokens) from this lane's saved state. Raises SourceError if it cannot be its own state."""
        cursor, offset = read_state(state)
        if cursor.place >= len(self.parts):
            raise SourceError(
                f"lane {self.lane}: the saved position is beyond its {len(self.parts)} shards; "
                "resume with the same sources"
            )
        return cursor, offset


def lane_plans(config: DataConfig, lanes: int, shards: int) -> list[LanePlan]:
    """Assigns every row of every shard to exactly one lane.

    Lane l reads the shards l, l + lanes, ..., as long as there is one for each lane. The lanes share the n shards that
    are left, or all shards if there are fewer than lanes: lane l reads a part of shard ``l mod n`` among them. With
    ``data.concatenate``, if there are fewer shards than lanes, all lanes share each shard and get equal parts of it.
    """
    if config.concatenate and shards < lanes:
        shares = [[Part(shard, lanes, (lane + shard) % lanes) for shard in range(shards)] for lane in range(lanes)]
        return [LanePlan(lane, tuple(parts)) for lane, parts in enumerate(shares)]
    left = shards if shards < lanes else shards % lanes
    unshared = shards - left
    parts = [[Part(shard) for shard in range(lane, unshared, lanes)] for lane in range(lanes)]
    for lane in range(lanes if left else 0):
        first = lane % left
        parts[lane].append(Part(unshared + first, stride=len(range(first, lanes, left)), phase=lane // left))
    return [LanePlan(lane, tuple(parts[lane])) for lane in range(lanes)]


def seeded_order(count: int, *key: int) -> list[int]:
    """A permutation of ``range(count)`` that depends only on the key, on every machine and numpy version.

    The raw stream of numpy's PCG64 is part of its compatibility promise; ``Generator.permutation`` is not.
    """
    if count == 1:
        return [0]
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable").tolist()


def check_epoch(source: TextSource | None, epoch: int) -> None:
    """Raises SourceError if a source of a mixture must not be read in this epoch (from 0)."""
    if source is not None and source.may_end and epoch >= (source.max_epochs or 0):
        raise SourceError(
            f"{times_read(source)}; give it less weight, more text or a higher max_epochs, train for fewer steps, "
            "or set at_max_epochs: warn"
        )


def times_read(source: TextSource) -> str:
    times = "once" if source.max_epochs == 1 else f"{source.max_epochs} times"
    return f"the source {source.label} has been read {times}, its max_epochs"


@dataclass
class LaneRows(Generic[Row]):
    """``rows_from(cursor)`` yields (row, cursor after it), from any cursor that it yielded before or that was saved.

    Of ``config``, only the seed, ``shuffle_documents`` and the limit on bad records are used here; ``open_rows`` has
    its own settings.
    """

    plan: LanePlan
    shards: Sequence[Shard]
    config: DataConfig
    open_rows: OpenRows
    encode: Encode[Row]
    source: TextSource | None = None  # in a mixture
    notes: list[str] = field(default_factory=list)  # messages about skipped rows; the owner empties the list

    def rows_from(self, cursor: Cursor) -> Generator[tuple[Encoded, Cursor], None, None]:
        """Endless. Raises SourceError if a shard cannot be read, too many rows are bad, or an epoch has no text."""
        while True:
            check_epoch(self.source, cursor.epoch)
            order = self.plan.order(self.config.seed, cursor.epoch)
            epoch_start = cursor
            for place in range(cursor.place, len(order)):
                cursor = yield from self._rows_of_part(order[place], cursor)
                cursor = cursor._replace(place=place + 1, block=0, item=0, bad=0)
            was_whole = (epoch_start.place, epoch_start.block, epoch_start.item) == (0, 0, 0)
            if was_whole and cursor.documents == epoch_start.documents:
                raise self._no_text(epoch_start, cursor)
            cursor = cursor._replace(epoch=cursor.epoch + 1, place=0)

    def _rows_of_part(self, part: Part, cursor: Cursor) -> Generator[tuple[Encoded, Cursor], None, Cursor]:
        """Yields the rows of a part from the cursor on and returns the cursor at its end."""
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
                block.clear()
                cursor = yield from self._encoded(remaining, cursor)
                bad_before = rows.bad
                block = rows.take(size)
                if block:
                    cursor = cursor._replace(block=cursor.block + 1, item=0, bad=bad_before)
            return cursor.after_skipping("empty_shard") if rows.is_empty else cursor

    def _encoded(
        self, remaining: list[Row | Skipped], cursor: Cursor
    ) -> Generator[tuple[Encoded, Cursor], None, Cursor]:
        """Tokenizes the rest of a block, the last row first, and counts what cannot be used."""
        for rows in in_calls(_popped(remaining), ENCODE_ROWS, ENCODE_CHARACTERS):
            encoded = iter(self.encode([row for row in rows if not isinstance(row, Skipped)]))
            for row in rows:
                result = row if isinstance(row, Skipped) else next(encoded)
                if isinstance(result, Skipped):
                    cursor = cursor._replace(item=cursor.item + 1).after_skipping(result.reason)
                    if result is not row:
                        self._check_record(result, cursor)
                else:
                    cursor = cursor.after_document()
                    yield result, cursor
        return cursor

    def _check_record(self, skipped: Skipped, cursor: Cursor) -> None:
        """Raises SourceError if too many records cannot be used, in the first epoch: others have the same records."""
        counts = cursor.skipped_by_reason()
        if counts[skipped.reason] <= NOTES_PER_REASON:
            self.notes.append(f"{skipped.detail}; skipped")
        bad = sum(counts[reason] for reason in ENCODING_REASONS)
        limit = self.config.max_bad_fraction
        if not cursor.epoch and (fault := too_many_records(bad, cursor.documents + bad, limit, skipped.detail)):
            raise fault

    def _no_text(self, before: Cursor, now: Cursor) -> SourceError:
        counts = zip(SKIP_REASONS, before.skipped, now.skipped, strict=True)
        skipped = ", ".join(
            f"{reason}: {to - was}" for reason, was, to in counts if to > was and reason != "empty_shard"
        )
        shards = ", ".join(self.shards[part.shard].label for part in self.plan.parts[:3])
        why, remedy = "there are fewer documents than lanes", "give more text or lower data.lanes"
        if skipped:
            why = f"all of its rows were skipped ({skipped})"
            remedy = f"correct them (docs/data.md#faults), {remedy}"
        if self.config.is_mixture:
            remedy += (
                f", or set the weight of its source {self.shards[0].source} to 0 in data.train and data.stages; a run "
                "that has begun also needs --train.allow_changes=[data.train,data.stages]"
            )
        return SourceError(f"lane {self.plan.lane} found no text in {shards}: {why}; {remedy}")

    def _became_shorter(self, shard: Shard) -> SourceError:
        return SourceError(
            f"lane {self.plan.lane}: {shard.label} has fewer lines than when its position was saved; "
            "resume with the same files, or set another data.seed to read the new text from its beginning"
        )


def _popped(rows: list[T]) -> Iterator[T]:
    """The rows from the last to the first. A block of text is large, and this way each row is freed once it is used."""
    while rows:
        yield rows.pop()
