"""Which rows a lane reads and in which order, and its position, which is a handful of numbers in a checkpoint."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import BAD_REASONS, SKIP_REASONS

LaneStates = dict[str, dict[str, Any]]  # by ``state_key``, which is a string because JSON has no other keys


class Cursor(NamedTuple):
    """A position just before a row of a lane, with the counts of rows that were passed to get there."""

    epoch: int = 0
    place: int = 0  # in the lane's shard order of this epoch
    block: int = 0  # of shuffled rows within the shard
    item: int = 0  # in the block's shuffled order
    bad: int = 0  # bad own rows of the shard before the block
    documents: int = 0  # finished since the start of the run
    skipped: Mapping[str, int] = {}  # rows by reason, since the start of the run

    def after_document(self) -> "Cursor":
        """The position after the document at this place, in the same block."""
        # _replace would take three times as long, and this is called for every document
        return Cursor(self.epoch, self.place, self.block, self.item + 1, self.bad, self.documents + 1, self.skipped)

    def after_skipping(self, reason: str) -> "Cursor":
        """The same place with one more skipped row."""
        return self._replace(skipped={**self.skipped, reason: self.skipped.get(reason, 0) + 1})

    def state(self, offset: int) -> dict[str, Any]:
        """The JSON-able state in a checkpoint. The lane is ``offset`` tokens into the document at the cursor."""
        return {**self._asdict(), "offset": offset}


def read_state(state: Mapping[str, Any]) -> tuple[Cursor, int]:
    """(cursor, offset in tokens) from a lane's saved state."""
    return Cursor(**{name: state[name] for name in Cursor._fields}), state["offset"]


def state_key(lane: int, source: str) -> str:
    """The key of a lane's state. In a mixture, whose sources have names, a lane has one state per source."""
    return f"{lane}/{source}" if source else str(lane)


def read_key(key: str) -> tuple[int, str]:
    """(lane, source) from a key."""
    lane, _, source = key.partition("/")
    return int(lane), source


def start_states(lanes: int, sources: Sequence[str] = ("",)) -> LaneStates:
    """The states of all lanes before their first block."""
    return {
        state_key(lane, source): Cursor().state(offset=0) | ({"blocks": 0} if source else {})
        for lane in range(lanes)
        for source in sources
    }


def merge_states(states: Iterable[Mapping[str, Mapping[str, Any]]]) -> LaneStates:
    """Joins the ``Batch.state`` of all ranks at one step."""
    merged = {key: dict(of_lane) for state in states for key, of_lane in state.items()}
    return dict(sorted(merged.items(), key=lambda item: read_key(item[0])))


def counts_of(states: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Totals over the given lanes since the start of the run. The totals of several ranks can be added.

    The keys are ``documents``, ``epoch``, ``bad`` (all bad rows) and ``skipped/<reason>`` for every reason of
    ``SKIP_REASONS``, in that order and even if it is 0. A mixture adds ``blocks/<name>`` and ``epoch/<name>`` for each
    source. An epoch is not a total, but the epoch of the least advanced lane.
    """
    skipped = {reason: sum(state["skipped"].get(reason, 0) for state in states.values()) for reason in SKIP_REASONS}
    counts = {
        "documents": sum(state["documents"] for state in states.values()),
        "epoch": min(state["epoch"] for state in states.values()),
        "bad": sum(skipped[reason] for reason in BAD_REASONS),
        **{f"skipped/{reason}": count for reason, count in skipped.items()},
    }
    for source in sorted({read_key(key)[1] for key in states} - {""}):
        own = [state for key, state in states.items() if read_key(key)[1] == source]
        counts[f"blocks/{source}"] = sum(state["blocks"] for state in own)
        counts[f"epoch/{source}"] = min(state["epoch"] for state in own)
    return counts


class Part(NamedTuple):
    """A lane's share of a shard: one of ``stride``, in turn or a range of rows, as the shard's format has it."""

    shard: int  # number in the list of shards
    stride: int = 1
    phase: int = 0


def lane_parts(config: DataConfig, lanes: int, shards: int) -> list[list[Part]]:
    """The parts that each lane reads in every epoch: every row of every shard belongs to exactly one lane.

    Lane l reads the shards l, l + lanes, ..., as long as there is one for each lane. The lanes share the n shards that
    are left, or all shards if there are fewer than lanes: lane l reads a part of shard ``l mod n`` among them. With
    ``data.concatenate``, if there are fewer shards than lanes, all lanes share each shard and get equal parts of it.
    """
    if config.concatenate and shards < lanes:
        return [[Part(shard, lanes, (lane + shard) % lanes) for shard in range(shards)] for lane in range(lanes)]
    left = shards if shards < lanes else shards % lanes
    unshared = shards - left
    parts = [[Part(shard) for shard in range(lane, unshared, lanes)] for lane in range(lanes)]
    for lane in range(lanes if left else 0):
        first = lane % left
        parts[lane].append(Part(unshared + first, stride=len(range(first, lanes, left)), phase=lane // left))
    return parts


def parts_in_order(parts: Sequence[Part], seed: int, lane: int, epoch: int) -> list[Part]:
    """The parts of a lane in the order of an epoch."""
    return [parts[at] for at in seeded_order(len(parts), seed, lane, epoch)]


def seeded_order(count: int, *key: int) -> list[int]:
    """A permutation of ``range(count)`` that depends only on the key, on every machine and numpy version.

    The raw stream of numpy's PCG64 is part of its compatibility promise; ``Generator.permutation`` is not.
    """
    if count == 1:
        return [0]
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable").tolist()
