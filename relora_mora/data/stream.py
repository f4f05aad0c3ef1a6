"""The training stream: this rank's share of every global batch, the same blocks on any number of ranks and workers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from relora_mora.config import DataConfig
from relora_mora.data.errors import SourceError, WorkerError
from relora_mora.data.lanes import LaneStates, read_state
from relora_mora.data.positions import describe_position
from relora_mora.data.producer import Part, Producer, Task
from relora_mora.data.retry import RETRIES
from relora_mora.data.sources import Shard, resolve_shards
from relora_mora.data.texts import BAD, KINDS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: ``n = batch_size / world_size`` sequences, ordered by lane.

    ``labels`` are already shifted: ``labels[i, j]`` is the token after ``input_ids[i, j]``. ``document_ids`` number the
    documents inside each sequence (an EOS begins the one after it). ``state`` says where this rank's lanes are after this batch.
    """

    input_ids: torch.Tensor  # int64 [n, T]
    labels: torch.Tensor  # int64 [n, T]
    document_ids: torch.Tensor | None  # int32 [n, T], with data.document_mask
    state: LaneStates
    counts: dict[str, int]  # see counts_of; and retries, of its workers and this process since the stream was built
    notes: list[str]  # skipped lines met on the way, a few per shard: for the log


class TrainStream:
    """An endless iterator over this rank's batches; ``close()`` (or a with statement) ends its workers at once.

    ``lanes`` is the number of lanes of all ranks; rank r reads the lanes r, r + world_size, .... ``state`` is None or the
    merged states of all ranks (``merge_states``), from any number of ranks and workers; ``shards`` saves resolving the sources
    again. Build it in a thread that lives as long as the stream: its workers end with that thread. Raises SourceError for
    sources that cannot be read, ValueError for numbers that do not divide.
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
        shards: Sequence[Shard] | None = None,
    ) -> None:
        if batch_size % lanes or lanes % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"{lanes} lanes, {batch_size} sequences per batch, rank {rank} of {world_size}: "
                "the lanes must divide the batch and the ranks the lanes; change data.lanes or train.batch_size"
            )
        if shards is None:
            shards = resolve_shards(
                config.train, config.revision, split="train", timeout_seconds=config.timeout_seconds
            )
        states = _checked(state, lanes)
        self.config = config
        self._shards, self._lanes_of_all = shards, lanes
        self._lanes = list(range(rank, lanes, world_size))
        self._retries_before = RETRIES.retries
        self._blocks_per_lane = batch_size // lanes
        workers = self._workers = min(config.workers, len(self._lanes))
        shares = [self._lanes[number::workers] for number in range(workers)] if workers else [self._lanes]
        tasks = [
            Task(
                config,
                shards,
                tokenizer_path,
                share,
                lanes,
                self._blocks_per_lane,
                {str(n): states[str(n)] for n in share if states},
            )
            for share in shares
        ]
        self._producers: list[Any] = []
        if workers:
            from relora_mora.data.worker import (
                Worker,  # here, since it is run as a program, which must not be imported already
            )

            try:
                for task in tasks:
                    self._producers.append(Worker(task))
                for worker in self._producers:
                    worker.start()
            except BaseException:
                self.close()
                raise
        else:
            self._producers.append(Producer(tasks[0]))
        self._eos = _eos_token(tokenizer_path) if config.document_mask else -1

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        for producer in self._producers:
            while producer.is_dead:  # told at once, though another one may wait for the network; ends with its error
                producer.produce()
        parts: list[Part] = [producer.produce() for producer in self._producers]
        return self._batch(parts)

    def ready(self, timeout_seconds: float) -> bool:
        """Wait at most so long for the next batch; whether ``next()`` would give it (or its error) at once. Without workers always true."""
        end = time.monotonic() + timeout_seconds
        if any(producer.is_dead for producer in self._producers):
            return True
        return all(producer.ready(max(0.0, end - time.monotonic())) for producer in self._producers)

    def hung(self, seconds: float) -> WorkerError | None:
        """A worker that owes a part and has used no processor time for so long: stopped, or in a read that never returns."""
        for producer in self._producers:
            if (idle := producer.idle_seconds()) > seconds:
                return WorkerError(
                    f"data worker {producer.pid} hangs: it has done nothing for {idle:.0f} s (data.timeout_seconds and a minute); was it "
                    "stopped, or does a network file system not answer?"
                )
        return None

    def own_part(self, state: Mapping[str, Mapping[str, Any]]) -> LaneStates:
        """Of the merged states of all ranks, those of this rank's lanes."""
        return {str(lane): dict(state[str(lane)]) for lane in self._lanes if str(lane) in state}

    def describe(
        self, state: Mapping[str, Mapping[str, Any]], since: Mapping[str, Mapping[str, Any]] | None = None
    ) -> list[str]:
        """Where the lanes of a ``Batch.state`` are, in words; with the ``since`` state before it, the data between them."""
        return describe_position(state, lanes=self._lanes_of_all, shards=self._shards, config=self.config, since=since)

    def __enter__(self) -> TrainStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._producers:
            self._producers.pop().close()

    def _batch(self, parts: list[Part]) -> Batch:
        import torch

        length = self.config.sequence_length
        blocks = np.empty((len(self._lanes), self._blocks_per_lane, length + 1), np.int64)
        for number, part in enumerate(parts):
            blocks[number :: len(parts)] = part.blocks.reshape(-1, self._blocks_per_lane, length + 1)
        flat = blocks.reshape(-1, length + 1)
        states = merge_states([part.states for part in parts])
        ids = torch.from_numpy(document_ids(flat[:, :-1], self._eos)) if self.config.document_mask else None
        retries = RETRIES.retries - self._retries_before + (sum(part.retries for part in parts) if self._workers else 0)
        return Batch(
            input_ids=torch.from_numpy(flat[:, :-1].copy()),
            labels=torch.from_numpy(flat[:, 1:].copy()),
            document_ids=ids,
            state={str(lane): states[str(lane)] for lane in self._lanes},
            counts={**counts_of(states), "retries": retries},
            notes=[note for part in parts for note in part.notes],
        )


def document_ids(input_ids: Any, eos: int) -> Any:
    """int32 [n, T]: the number of EOS up to and including each token of ``input_ids`` [n, T].

    An EOS belongs to the document after it, as that document's first input: so it also is at the start of a text that is
    scored alone. What predicts a document's first token then sees nothing of the document before.
    """
    return np.cumsum(input_ids == eos, axis=1, dtype=np.int32)


def merge_states(states: Iterable[Mapping[str, Mapping[str, Any]]]) -> LaneStates:
    """One dict {lane: state} of the ``Batch.state`` of all ranks at the same step. A lane that stands in two of them must be an error."""
    merged: LaneStates = {}
    for state in states:
        for lane, lane_state in state.items():
            if lane in merged:
                raise ValueError(
                    f"lane {lane} stands in the data state of two ranks; merge the states of different ranks at one step"
                )
            merged[lane] = dict(lane_state)
    return dict(sorted(merged.items(), key=lambda item: int(item[0])))


def counts_of(states: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Totals over some lanes since the start of the run; they add up over ranks, but ``epoch``, which is the least advanced lane's.

    ``documents``, ``epoch``, ``bad`` (all bad lines) and ``skipped/<kind>`` for every kind of ``KINDS``, in that order, met or not.
    """
    skipped = {kind: sum(state["skipped"].get(kind, 0) for state in states.values()) for kind in KINDS}
    return {
        "documents": sum(state["documents"] for state in states.values()),
        "epoch": min(state["epoch"] for state in states.values()),
        "bad": sum(skipped[kind] for kind in BAD),
        **{f"skipped/{kind}": count for kind, count in skipped.items()},
    }


def _checked(state: Mapping[str, Mapping[str, Any]] | None, lanes: int) -> Mapping[str, Mapping[str, Any]]:
    if not state:
        return {}
    if set(state) != {str(lane) for lane in range(lanes)}:
        raise SourceError(
            f"the saved data state has {len(state)} lanes, this run {lanes}; "
            "set data.lanes (and a train.batch_size that it divides) to what the run was started with"
        )
    for lane_state in state.values():
        read_state(lane_state)
    return state


def _eos_token(tokenizer_path: str) -> int:
    from relora_mora.tokenizer import load_tokenizer

    return int(load_tokenizer(tokenizer_path).eos_token_id)  # type: ignore[arg-type]
