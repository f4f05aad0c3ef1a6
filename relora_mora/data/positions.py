"""Where lanes stand, in words: for a person who looks for the text of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relora_mora.config import DataConfig
from relora_mora.data.encoders import packing_of
from relora_mora.data.lane_states import Cursor, read_key
from relora_mora.data.lanes import LanePlan, lane_plans
from relora_mora.data.mixture import shards_of_source
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
    sentences = []
    for key in sorted(state, key=read_key):
        lane, source = read_key(key)
        own = shards_of_source(shards, config, source)
        packing = packing_of(config, own)
        plan = lane_plans(config, lanes, len(own), packing)[lane]
        counted = "tokens of the next document" if packing == "stream" else "sequences of what follows"
        here = _place(plan, *plan.read(state[key]), own, config, counted)
        name = f"lane {lane}, {source}" if source else f"lane {lane}"
        if since is None:
            sentences.append(f"{name}: {here}")
        elif since.get(key) != state[key]:  # of a mixture, a batch takes from some sources only
            before = plan.read(since[key]) if key in since else (Cursor(), 0)
            sentences.append(f"{name}: from {_place(plan, *before, own, config, counted)} to {here}")
    return sentences


def _place(
    plan: LanePlan, cursor: Cursor, offset: int, shards: Sequence[Shard], config: DataConfig, counted: str
) -> str:
    place = _rows_behind(plan, cursor, shards, config)
    return f"{place} and {offset} {counted}" if offset else place


def _rows_behind(plan: LanePlan, cursor: Cursor, shards: Sequence[Shard], config: DataConfig) -> str:
    part = plan.order(config.seed, cursor.epoch)[cursor.place]
    shard = shards[part.shard]
    if shard.format.in_groups:  # whose rows these are in the file stands in it
        first = cursor.block * config.shuffle_documents + 1
        share = f" of share {part.phase + 1} of {part.stride}" if part.stride > 1 else ""
        rows = f"behind {cursor.item} of rows {first} to {first + config.shuffle_documents - 1}{share} (shuffled)"
        return f"epoch {cursor.epoch}, {shard.label}, {rows}"
    unit = shard.format.unit or config.sample_by
    first = cursor.block * config.shuffle_documents * part.stride + part.phase + 1
    last = first + (config.shuffle_documents - 1) * part.stride
    if last == first:
        lines = f"{'behind' if cursor.item else 'before'} {unit} {first}"
    else:
        steps = f" in steps of {part.stride}" if part.stride > 1 else ""
        lines = f"behind {cursor.item} of {unit}s {first} to {last}{steps} (shuffled)"
    return f"epoch {cursor.epoch}, {shard.label}, {lines}"
