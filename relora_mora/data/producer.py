"""The blocks of some lanes for each global batch, made in one process: the trainer's, or a worker's."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from relora_mora.config import DataConfig
from relora_mora.data.lane_states import LaneStates
from relora_mora.data.lanes import LaneRows, plan_lanes
from relora_mora.data.packing import Block, Lane, Mask, Tokens
from relora_mora.data.plain_text import text_encoder
from relora_mora.data.retry import RETRIES
from relora_mora.data.sources import Shard
from relora_mora.data.token_rows import only_tokens, open_any, or_tokens


@dataclass(frozen=True)
class Assignment:
    """What one process reads: some lanes, ``blocks_per_lane`` blocks of each per global batch."""

    config: DataConfig
    shards: Sequence[Shard]
    tokenizer_path: str
    lanes: Sequence[int]
    lanes_of_all: int
    blocks_per_lane: int
    states: Mapping[str, Mapping[str, Any]]  # of these lanes; empty at the start of a run


@dataclass
class LaneBlocks:
    """What one process made for one global batch."""

    tokens: Tokens  # [lanes * blocks_per_lane, T + 1], ordered by lane
    scored: Mask | None  # [lanes * blocks_per_lane, T]; None where all tokens are
    states: LaneStates
    retries: int  # so far, of all that this process reads
    notes: list[str] = field(default_factory=list)


class Producer:
    """Reads, tokenizes and packs the lanes of an assignment, in this process."""

    is_dead = False

    def __init__(self, assignment: Assignment) -> None:
        from relora_mora.tokenizer import load_tokenizer

        config = assignment.config
        shards = assignment.shards
        made = shards[0].tokens
        if made is None or any(shard.tokens is None for shard in shards):
            tokenizer = load_tokenizer(assignment.tokenizer_path)
            encode = or_tokens(text_encoder(tokenizer))
            eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        else:
            encode = only_tokens
            eos = made.making.eos
        plans = plan_lanes(assignment.lanes_of_all, len(shards))
        self.blocks_per_lane = assignment.blocks_per_lane
        self.lanes = [
            Lane(
                LaneRows(plans[lane], shards, config, functools.partial(open_any, config)),
                encode,
                eos=eos,
                sequence_length=config.sequence_length,
                restored=assignment.states.get(str(lane)),
            )
            for lane in assignment.lanes
        ]

    def produce(self) -> LaneBlocks:
        """The next global batch's blocks of these lanes. Raises SourceError."""
        blocks = [lane.next_block() for lane in self.lanes for _ in range(self.blocks_per_lane)]
        notes = [note for lane in self.lanes for note in lane.rows.notes]
        for lane in self.lanes:
            lane.rows.notes.clear()
        return LaneBlocks(
            tokens=np.stack([block.tokens for block in blocks]),
            scored=_stacked_masks(blocks),
            states={str(lane.rows.plan.lane): lane.state() for lane in self.lanes},
            retries=RETRIES.retries,
            notes=notes,
        )

    def ready(self, timeout_seconds: float) -> bool:
        return True

    def hung(self, seconds: float) -> None:
        return None

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()


def _stacked_masks(blocks: Sequence[Block]) -> Mask | None:
    """The masks [blocks, T]; None where every token of every block is scored."""
    if all(block.scored is None for block in blocks):
        return None
    all_scored = np.ones(len(blocks[0].tokens) - 1, np.bool_)
    return np.stack([all_scored if block.scored is None else block.scored for block in blocks])
