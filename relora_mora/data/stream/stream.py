"""The training stream: this rank's share of every global batch, the same for any number of ranks and workers."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import WorkerError
from relora_mora.data.lanes import (
    LaneStates,
    check_states,
    counts_of,
    lane_plans,
    merge_states,
    read_key,
    read_state,
    start_states,
)
from relora_mora.data.records.encoders import packing_of
from relora_mora.data.shard import Shard
from relora_mora.data.sources import configured_shards
from relora_mora.data.stream.packing import UNSCORED, Batch
from relora_mora.data.stream.producer import Assignment, LaneBlocks, Producer, mixture_names, shards_of_source
from relora_mora.data.stream.worker import WorkerProcess


def describe_position(
    state: Mapping[str, Mapping[str, Any]], *, lanes: int, shards: Sequence[Shard], config: DataConfig
) -> list[str]:
    """A sentence for each lane of a ``Batch.state``: its epoch, its shard, and where it is in it.

    Documents are shuffled in blocks, so a sentence names a whole block of the lane's share of the shard (from 1), and
    how many of the block were read. Raises SourceError for a position that is impossible in its lane.
    """
    sentences = []
    for key in sorted(state, key=read_key):
        lane, source = read_key(key)
        own = shards_of_source(shards, config, source)
        if packing_of(config, own) == "stream":
            plan = lane_plans(config, lanes, len(own))[lane]
            cursor, offset = plan.read(state[key])
            part = plan.order(config.seed, cursor.epoch)[cursor.place]
            first = cursor.block * config.shuffle_documents + 1
            place = f"{own[part.shard].label}, {cursor.item} of documents {first} to "
            place += f"{first + config.shuffle_documents - 1} of share {part.phase + 1} of {part.stride} (shuffled)"
            if offset:
                place += f" and {offset} tokens"
        else:
            cursor, _ = read_state(state[key])
            place = f"{cursor.block} sequences of all lanes"
        sentences.append(f"lane {lane}{source and f', {source}'}: epoch {cursor.epoch}, after {place}")
    return sentences


class TrainStream:
    """An endless iterator over this rank's batches; ``close()`` (or a with statement) ends its workers at once.

    ``lanes`` is the number of lanes over all ranks; rank r reads the lanes r, r + world_size, .... ``state`` is None or
    the merged states of all ranks (``merge_states``), saved by any number of ranks and workers. ``step`` is the number
    of global batches before the next one, on which a mixture depends. ``shards`` saves resolving the sources again;
    those of rows that are packed whole must be tokenized (``make.tokens_of_whole_rows``).
    Build the stream in a thread that lives as long as the stream, because its workers end with that thread. Raises
    SourceError for sources that cannot be read, ValueError for numbers that do not divide.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer_path: str,
        batch_size: int,
        lanes: int,
        rank: int,
        world_size: int,
        state: Mapping[str, Mapping[str, Any]] | None = None,
        step: int = 0,
        shards: Sequence[Shard] | None = None,
    ) -> None:
        if batch_size % lanes or lanes % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"{lanes} lanes, {batch_size} sequences per batch, rank {rank} of {world_size}: "
                "the lanes must divide the batch and the ranks the lanes; change data.lanes or train.batch_size"
            )
        if state:
            check_states(state, lanes, mixture_names(config))
        self._work = Assignment(
            config=config,
            shards=configured_shards(config, "train") if shards is None else shards,
            tokenizer_path=tokenizer_path,
            lanes=range(rank, lanes, world_size),
            lanes_of_all=lanes,
            blocks_per_lane=batch_size // lanes,
        )
        self._masks_documents = config.masks_documents_of(config.train)
        self._producers: list[Producer | WorkerProcess] = []
        self.go_back(step, state or {})

    def go_back(self, step: int, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes to ``state``, after ``step`` global batches; batches that were read ahead are dropped."""
        self.close()
        lanes = self._work.lanes
        workers = min(self._work.config.workers, len(lanes))
        start = WorkerProcess if workers else Producer
        try:
            for number in range(workers or 1):
                share = lanes[number :: workers or 1]
                own = _states_of(share, state)
                self._producers.append(start(replace(self._work, lanes=share, batch=step, states=own)))
            for producer in self._producers:
                producer.begin()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        for producer in self._producers:
            # raises its error immediately, although another producer may be waiting for the network
            while producer.is_dead:
                producer.produce()
        return self._batch([producer.produce() for producer in self._producers])

    def ready(self, timeout_seconds: float) -> bool:
        """Waits for the next batch; whether ``next()`` would return it, or raise its error, immediately.

        Always true without workers.
        """
        end = time.monotonic() + timeout_seconds
        if any(producer.is_dead for producer in self._producers):
            return True
        return all(producer.ready(max(0.0, end - time.monotonic())) for producer in self._producers)

    def hung(self, seconds: float) -> WorkerError | None:
        """The error to raise if a worker owes blocks but has used no processor time for so many seconds."""
        return next(filter(None, (producer.hung(seconds) for producer in self._producers)), None)

    def own_part(self, state: Mapping[str, Mapping[str, Any]]) -> LaneStates:
        """The states of this rank's lanes among the merged states of all ranks."""
        return _states_of(self._work.lanes, state)

    def describe(self, before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Where the lanes were before a batch, from its state and the one before it."""
        work = self._work
        start = start_states(work.lanes_of_all, mixture_names(work.config))
        changed = {key: before.get(key, start[key]) for key, state in after.items() if before.get(key) != state}
        return describe_position(changed, lanes=work.lanes_of_all, shards=work.shards, config=work.config)

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._producers:
            self._producers.pop().close()

    def _batch(self, shares: list[LaneBlocks]) -> Batch:
        import torch

        by_lane = {lane: blocks for share in shares for lane, blocks in share.blocks.items()}
        blocks = [block for lane in self._work.lanes for block in by_lane[lane]]
        tokens, scored, documents = map(np.stack, zip(*blocks, strict=True))
        tokens = tokens.astype(np.int64)
        states = merge_states([share.states for share in shares])
        return Batch(
            input_ids=torch.from_numpy(tokens[:, :-1].copy()),
            labels=torch.from_numpy(np.where(scored, tokens[:, 1:], UNSCORED)),
            document_ids=torch.from_numpy(documents) if self._masks_documents else None,
            state=states,
            counts={**counts_of(states), "retries": sum(share.retries for share in shares)},
            notes=[note for share in shares for note in share.notes],
        )


def _states_of(lanes: Sequence[int], states: Mapping[str, Mapping[str, Any]]) -> LaneStates:
    return {key: dict(state) for key, state in states.items() if read_key(key)[0] in lanes}
