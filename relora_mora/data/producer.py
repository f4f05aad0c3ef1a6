"""Global batches of some lanes, made in one process: the trainer's, or a worker's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from relora_mora.config import DataConfig
from relora_mora.data.lanes import Lane, LaneStates, Tokens, plan_lanes
from relora_mora.data.retry import RETRIES
from relora_mora.data.sources import Shard


@dataclass(frozen=True)
class Task:
    """What one process reads: some lanes, ``blocks_per_lane`` blocks of each per global batch."""

    config: DataConfig
    shards: Sequence[Shard]
    tokenizer_path: str
    lanes: Sequence[int]
    lanes_of_all: int
    blocks_per_lane: int
    states: Mapping[str, Mapping[str, Any]]  # of these lanes; empty at the start of a run


@dataclass
class Part:
    """What one process made for one global batch."""

    blocks: Tokens  # [lanes * blocks_per_lane, T + 1]
    states: LaneStates
    retries: int  # so far, of all that this process reads
    notes: list[str] = field(default_factory=list)


class Producer:
    """Reads, tokenizes and packs the lanes of a task, in this process."""

    is_dead = False

    def __init__(self, task: Task) -> None:
        from relora_mora.tokenizer import encode, load_tokenizer

        tokenizer = load_tokenizer(task.tokenizer_path)
        plans = plan_lanes(task.lanes_of_all, len(task.shards))
        self.task = task
        self.lanes = [
            Lane(
                plans[lane],
                task.shards,
                task.config,
                lambda texts: encode(tokenizer, texts),
                int(tokenizer.eos_token_id),  # type: ignore[arg-type]
                task.states.get(str(lane)),
            )
            for lane in task.lanes
        ]

    def produce(self) -> Part:
        """The next global batch's blocks of these lanes. Raises SourceError."""
        blocks = np.stack([lane.next_block() for lane in self.lanes for _ in range(self.task.blocks_per_lane)])
        notes = [note for lane in self.lanes for note in lane.notes]
        for lane in self.lanes:
            lane.notes.clear()
        states = {str(lane.plan.lane): lane.state() for lane in self.lanes}
        return Part(blocks, states, RETRIES.retries, notes)

    def ready(self, timeout_seconds: float) -> bool:
        return True

    def idle_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()
