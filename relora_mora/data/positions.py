"""Where lanes stand, in words: for a person who looks for the text of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relora_mora.config import DataConfig
from relora_mora.data.lane_states import Cursor
from relora_mora.data.lanes import LanePlan, plan_lanes
from relora_mora.data.sources import Shard


def describe_position(
    state: Mapping[str, Mapping[str, Any]],
    *,
    lanes: int,
    shards: Sequence[Shard],
    config: DataConfig,
    since: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """A sentence for each lane of a ``Batch.state``: epoch, shard, and how many of which lines (from 1) are behind it.

    Documents are shuffled, so the lines are those of a whole block; the last block of a shard may have fewer than are
    named. ``since`` is an earlier state, that before a batch for instance: the sentence then names the data in between.
    A lane that it lacks was at its start. Raises SourceError for a position that its lane cannot have.
    """
    plans = plan_lanes(lanes, len(shards))
    sentences = []
    for lane in sorted(map(int, state)):
        here = _place(plans[lane], *plans[lane].read(state[str(lane)]), shards, config)
        if since is None:
            sentences.append(f"lane {lane}: {here}")
        else:
            before = plans[lane].read(since[str(lane)]) if str(lane) in since else (Cursor(), 0)
            sentences.append(f"lane {lane}: from {_place(plans[lane], *before, shards, config)} to {here}")
    return sentences


def _place(plan: LanePlan, cursor: Cursor, offset: int, shards: Sequence[Shard], config: DataConfig) -> str:
    shard = shards[plan.order(config.seed, cursor.epoch)[cursor.place]]
    if shard.format.in_groups:  # whose rows these are in the file stands in it
        first = cursor.block * config.shuffle_documents + 1
        share = f" of share {plan.phase + 1} of {plan.stride}" if plan.stride > 1 else ""
        rows = f"behind {cursor.item} of rows {first} to {first + config.shuffle_documents - 1}{share} (shuffled)"
        return _with_offset(f"epoch {cursor.epoch}, {shard.name}, {rows}", offset)
    unit = shard.format.unit or config.sample_by
    first = cursor.block * config.shuffle_documents * plan.stride + plan.phase + 1
    last = first + (config.shuffle_documents - 1) * plan.stride
    if last == first:
        lines = f"{'behind' if cursor.item else 'before'} {unit} {first}"
    else:
        steps = f" in steps of {plan.stride}" if plan.stride > 1 else ""
        lines = f"behind {cursor.item} of {unit}s {first} to {last}{steps} (shuffled)"
    return _with_offset(f"epoch {cursor.epoch}, {shard.name}, {lines}", offset)


def _with_offset(place: str, offset: int) -> str:
    return f"{place} and {offset} tokens of the next document" if offset else place
