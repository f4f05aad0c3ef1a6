"""Produces the blocks of some lanes for each global batch, in the trainer's process or in a worker.

Which source of a mixture a block comes from is a function of only the step and the weights. There is no state to save,
so a run may move to any number of ranks, and weights may change at a resume.
"""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from relora_mora.config.data import DataConfig
from relora_mora.data.lanes import LaneStates, lane_parts, seeded_order, state_key
from relora_mora.data.network import RETRIES
from relora_mora.data.records.encoders import encoder_of, packing_of
from relora_mora.data.rows import Encode
from relora_mora.data.shard import Shard
from relora_mora.data.stream.lane import Lane
from relora_mora.data.stream.packing import Block, WholeLane, WholeRows
from relora_mora.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURNS = 0x7475726E  # a seed that makes the orders of rotations independent of the orders of documents


@dataclass(frozen=True)
class Weights:
    """The weights from some step on. ``shares`` belong to ``names``, the largest first."""

    before: int  # global batches before the first one with these weights
    names: tuple[str, ...]
    shares: tuple[Fraction, ...]

    @staticmethod
    def of(weights: Mapping[str, float], before: int) -> "Weights":
        ordered = sorted(weights, key=lambda name: -weights[name])
        total = sum(map(Fraction, weights.values()))
        return Weights(before, tuple(ordered), tuple(Fraction(weights[name]) / total for name in ordered))

    def counts(self, blocks: int) -> list[int]:
        """How many of the first ``blocks`` blocks come from each source; no count decreases as ``blocks`` grows.

        Each source takes its share of the blocks that the larger sources left over, rounded to whole blocks, so its
        count is always less than two blocks away from its exact share.
        """
        left = blocks
        share_left = Fraction(1)
        taken = []
        for share in self.shares:
            count = (2 * left * share + share_left) // (2 * share_left) if share else 0
            taken.append(count)
            left -= count
            share_left -= share
        return taken


class Mixture:
    """The sources of every global batch; text that is not a mixture is a single source named ""."""

    def __init__(self, config: DataConfig, lanes: int, blocks_per_lane: int) -> None:
        self.lanes = lanes
        self.blocks_per_lane = blocks_per_lane
        self.names = mixture_names(config)
        weights = {source.label: source.weight for source in config.train} if config.is_mixture else {"": 1.0}
        self._stages = [Weights.of(weights, before=0)]
        self._stages += [Weights.of(stage.weights, before=stage.from_step - 1) for stage in config.stages]

    def sources(self, batch: int, lanes: Iterable[int]) -> list[list[str]]:
        """For each of these lanes, the sources of its blocks in the global batch with index ``batch``.

        The blocks of a source go to neighboring lanes, and the assignment is rotated from batch to batch. All rotations
        are used once in a random order, then again in another order. So each lane gets its share of every source, even
        if the pattern of the weights repeats.
        """
        if len(self.names) == 1:
            return [[self.names[0]] * self.blocks_per_lane for _ in lanes]
        stage = next(stage for stage in reversed(self._stages) if stage.before <= batch)
        size = self.lanes * self.blocks_per_lane
        first = (batch - stage.before) * size
        counts = zip(stage.counts(first), stage.counts(first + size), strict=True)
        ends = list(itertools.accumulate(after - before for before, after in counts))
        turn = _turns(self.lanes, batch // self.lanes)[batch % self.lanes]
        return [
            [stage.names[bisect_right(ends, slot)] for slot in range((lane - turn) % self.lanes, size, self.lanes)]
            for lane in lanes
        ]


@functools.lru_cache(maxsize=2)
def _turns(lanes: int, group: int) -> list[int]:
    return seeded_order(lanes, _TURNS, group)


def mixture_names(config: DataConfig) -> Sequence[str]:
    """The names of the sources, in the order of the settings; [""] if the training text is not a mixture."""
    return [source.label for source in config.train] if config.is_mixture else [""]


def shards_of_source(shards: Sequence[Shard], config: DataConfig, name: str) -> list[Shard]:
    """The shards of the source with this name (see :func:`mixture_names`)."""
    return [shard for shard in shards if shard.source == name] if config.is_mixture else list(shards)


@dataclass(frozen=True)
class Assignment:
    """The work of one process: some lanes, with ``blocks_per_lane`` blocks of each per global batch."""

    config: DataConfig
    shards: Sequence[Shard]  # see make.tokens_of_whole_rows
    tokenizer_path: str
    lanes: Sequence[int]
    lanes_of_all: int
    blocks_per_lane: int
    batch: int = 0  # index of the first global batch
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of these lanes; empty at the start of a run


@dataclass
class LaneBlocks:
    """The blocks of one process for one global batch."""

    blocks: dict[int, list[Block]]  # by lane
    states: LaneStates
    retries: int  # of all reads of the process since it began with this assignment
    notes: list[str]


def produce(work: Assignment) -> Generator[LaneBlocks, None, None]:
    """The blocks of an assignment for one global batch after the other, without end. Raises SourceError."""
    mixture = Mixture(work.config, work.lanes_of_all, work.blocks_per_lane)
    tokenizer = functools.cache(functools.partial(load_tokenizer, work.tokenizer_path))
    retries = RETRIES.retries
    lanes: dict[str, Lane | WholeLane] = {}
    try:
        for name in mixture.names:
            lanes |= _open_lanes(work, name, tokenizer)
        taken = {key: work.states.get(key, {}).get("blocks", 0) for key in lanes}
        for batch in itertools.count(work.batch):
            blocks = {}
            for lane, sources in zip(work.lanes, mixture.sources(batch, work.lanes), strict=True):
                keys = [state_key(lane, source) for source in sources]
                blocks[lane] = [lanes[key].next_block() for key in keys]
                for key in keys:
                    taken[key] += 1
            notes = []
            for each in lanes.values():
                notes += each.notes
                each.notes.clear()
            states = {key: each.state() for key, each in lanes.items()}
            if work.config.is_mixture:
                states = {key: state | {"blocks": taken[key]} for key, state in states.items()}
            yield LaneBlocks(blocks, states, RETRIES.retries - retries, notes)
    finally:
        for each in lanes.values():
            each.close()


def _open_lanes(
    work: Assignment, name: str, tokenizer: Callable[[], "PreTrainedTokenizerBase"]
) -> dict[str, Lane | WholeLane]:
    """The lanes of an assignment within the source with this name, by the keys of their states."""
    config = work.config
    shards = shards_of_source(work.shards, config, name)
    states = {lane: work.states.get(state_key(lane, name)) for lane in work.lanes}
    if packing_of(config, shards) != "stream":
        rows = WholeRows(shards, config)
        return {state_key(lane, name): WholeLane(rows, lane, work.lanes_of_all, states[lane]) for lane in states}
    parts = lane_parts(config, work.lanes_of_all, len(shards))
    if all(shard.tokens for shard in shards):
        eos = shards[0].tokens.making.eos  # type: ignore[union-attr]
    else:
        eos = int(tokenizer().eos_token_id)  # type: ignore[arg-type]
    encoder = functools.cache(lambda records: encoder_of(tokenizer(), records))

    def encode_of(shard: Shard) -> Encode[Any]:
        return list if shard.tokens else encoder(shard.records)

    return {
        state_key(lane, name): Lane(lane, parts[lane], shards, config, encode_of, eos=eos, restored=state)
        for lane, state in states.items()
    }
