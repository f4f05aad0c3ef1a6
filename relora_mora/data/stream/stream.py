"""The training stream: this rank's share of every global batch, the same for any number of ranks and workers."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import WorkerError
from relora_mora.data.lanes import (
    Cursor,
    LaneStates,
    counts_of,
    lane_parts,
    merge_states,
    parts_in_order,
    read_key,
    read_state,
)
from relora_mora.data.records.encoders import packing_of
from relora_mora.data.shard import Shard
from relora_mora.data.stream.packing import UNSCORED, Batch
from relora_mora.data.stream.producer import Assignment, LaneBlocks, produce, shards_of_source
from relora_mora.data.stream.worker import WorkerProcess


class TrainStream(Iterator[Batch], AbstractContextManager["TrainStream"]):
    """An endless iterator over this rank's batches; ``close()`` (or a with statement) ends its workers at once.

    ``lanes`` is the number of lanes over all ranks; rank r reads the lanes r, r + world_size, .... ``state`` is None or
    the merged states of all ranks (``merge_states``), saved by any number of ranks and workers. ``step`` is the number
    of global batches before the next one, on which a mixture depends. The ``shards`` of rows that are packed whole must
    be tokenized (``make.tokens_of_whole_rows``). Build the stream in a thread that lives as long as the stream, because
    its workers end with that thread. Raises SourceError for sources that cannot be read.
    """

    def __init__(
        self,
        config: DataConfig,
        shards: Sequence[Shard],
        *,
        tokenizer_path: str,
        batch_size: int,
        lanes: int,
        rank: int,
        world_size: int,
        state: Mapping[str, Mapping[str, Any]] | None = None,
        step: int = 0,
    ) -> None:
        assert not batch_size % lanes and not lanes % world_size, "the settings were checked"
        self._work = Assignment(
            config=config,
            shards=shards,
            tokenizer_path=tokenizer_path,
            lanes=range(rank, lanes, world_size),
            lanes_of_all=lanes,
            blocks_per_lane=batch_size // lanes,
        )
        self._masks_documents = config.masks_documents_of(config.train)
        self._workers: list[WorkerProcess] = []
        self._own: Generator[LaneBlocks, None, None] | None = None  # without workers
        self.go_back(step, state or {})

    def go_back(self, step: int, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes to ``state``, after ``step`` global batches; batches that were read ahead are dropped."""
        self.close()
        work = replace(self._work, batch=step, states=self.own_part(state))
        count = min(work.config.workers, len(work.lanes))
        if not count:
            self._own = produce(work)
            return
        try:
            for number in range(count):
                self._workers.append(WorkerProcess(replace(work, lanes=work.lanes[number::count])))
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Batch:
        if self._own is not None:
            return self._batch([next(self._own)])
        for worker in self._workers:
            # raises its error immediately, although another worker may be waiting for the network
            while worker.is_dead:
                worker.produce()
        return self._batch([worker.produce() for worker in self._workers])

    def ready(self, timeout_seconds: float) -> bool:
        """Waits for the next batch; whether ``next()`` would return it, or raise its error, immediately.

        Always true without workers.
        """
        end = time.monotonic() + timeout_seconds
        if any(worker.is_dead for worker in self._workers):
            return True
        return all(worker.ready(max(0.0, end - time.monotonic())) for worker in self._workers)

    def hung(self, seconds: float) -> WorkerError | None:
        """The error to raise if a worker owes blocks but has used no processor time for so many seconds."""
        return next(filter(None, (worker.hung(seconds) for worker in self._workers)), None)

    def own_part(self, state: Mapping[str, Mapping[str, Any]]) -> LaneStates:
        """The states of this rank's lanes among the merged states of all ranks."""
        return {key: dict(each) for key, each in state.items() if read_key(key)[0] in self._work.lanes}

    def describe(self, before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Where the lanes were before a batch that advanced them, from its state and the one before it.

        A row is one in the shuffled order of its block, and the tokens are those of the row after it.
        """
        work = self._work
        places = []
        for key in after:
            state = before.get(key) or Cursor().state(offset=0)
            lane, source = read_key(key)
            cursor, offset = read_state(state)
            if (cursor, offset) == read_state(after[key]):
                continue
            shards = shards_of_source(work.shards, work.config, source)
            file = ""
            if packing_of(work.config, shards) == "stream":
                parts = lane_parts(work.config, work.lanes_of_all, len(shards))[lane]
                part = parts_in_order(parts, work.config.seed, lane, cursor.epoch)[cursor.place]
                file = f"{shards[part.shard].label}, "
            place = f"block {cursor.block}, row {cursor.item} and {offset} tokens"
            places.append(f"lane {key}: epoch {cursor.epoch}, after {file}{place}")
        return places

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._own is not None:
            self._own.close()
            self._own = None
        while self._workers:
            self._workers.pop().close()

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
