"""The positions of lanes: a handful of numbers per lane, as checkpoints store them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from relora_mora.data.errors import BAD_REASONS, SKIP_REASONS, SourceError

LaneStates = dict[str, dict[str, Any]]  # by ``state_key``, which is a string because JSON has no other keys


class Cursor(NamedTuple):
    """A position just before a row of a lane, with the counts of rows that were passed to get there."""

    epoch: int = 0
    place: int = 0  # in the lane's shard order of this epoch
    block: int = 0  # of shuffled rows within the shard
    item: int = 0  # in the block's shuffled order
    bad: int = 0  # bad rows of the shard before the block
    documents: int = 0  # finished since the start of the run
    skipped: tuple[int, ...] = (0,) * len(SKIP_REASONS)  # per reason, since the start of the run

    def after_document(self) -> "Cursor":
        """The position after the document at this place, in the same block."""
        # _replace would take three times as long, and this is called for every document
        return Cursor(self.epoch, self.place, self.block, self.item + 1, self.bad, self.documents + 1, self.skipped)

    def after_skipping(self, reason: str) -> "Cursor":
        """The same place with one more skipped row counted."""
        return self.after_passing(reason, 1, documents=0)

    def after_passing(self, reason: str, count: int, *, documents: int) -> "Cursor":
        """The same place with ``count`` more rows for a reason; ``documents`` fewer count as finished documents."""
        at = SKIP_REASONS.index(reason)
        counts = self.skipped
        return self._replace(
            documents=self.documents - documents, skipped=(*counts[:at], counts[at] + count, *counts[at + 1 :])
        )

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
        state_key(lane, source): lane_state(Cursor().state(offset=0), source, blocks=0)
        for lane in range(lanes)
        for source in sources
    }


def lane_state(place: dict[str, Any], source: str, blocks: int) -> dict[str, Any]:
    """The state of a lane: its position and, for a source of a mixture, the number of blocks taken from it."""
    return {**place, "blocks": blocks} if source else place


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
