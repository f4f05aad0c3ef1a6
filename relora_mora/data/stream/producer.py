"""Produces the blocks of some lanes for each global batch, in the trainer's process or in a worker.

Which source of a mixture a block comes from is a function of only the step and the weights. There is no state to save,
so a run may move to any number of ranks, and weights may change at a resume.
"""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from relora_mora.config.data import DataConfig, TextSource
from relora_mora.data.lanes import LaneRows, LaneStates, lane_plans, seeded_order, state_key, times_read
from relora_mora.data.network import RETRIES
from relora_mora.data.read import open_rows
from relora_mora.data.records.encoders import encoder_of, packing_of
from relora_mora.data.rows import Encode
from relora_mora.data.shard import Shard
from relora_mora.data.stream.packing import Block, Lane
from relora_mora.data.stream.whole import WholeLane, WholeRows

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


def in_saved_order(config: DataConfig, saved: Mapping[str, Any]) -> DataConfig:
    """The same mixture with its sources in the order of the saved settings, if these name the same sources.

    A mixture reads the same text in any order. But among sources with equal weights the first one comes first in a
    batch, and fingerprints depend on the order of shards, so a run keeps the order that it started with.
    """
    listed = saved.get("train")
    records = [record for record in listed if isinstance(record, Mapping)] if isinstance(listed, list) else []
    names = [TextSource.model_validate(record).label for record in records]
    sources = {source.label: source for source in config.train}
    if not config.is_mixture or set(names) != set(sources):
        return config
    weights = {stage["from_step"]: list(stage["weights"]) for stage in saved.get("stages", ())}
    stages = [
        stage.model_copy(
            update={"weights": {name: stage.weights[name] for name in weights.get(stage.from_step, stage.weights)}}
        )
        for stage in config.stages
    ]
    return config.model_copy(update={"train": [sources[name] for name in names], "stages": stages})


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


class Producer:
    """Reads, tokenizes and packs the lanes of an assignment, in this process."""

    is_dead = False

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.mixture = Mixture(assignment.config, assignment.lanes_of_all, assignment.blocks_per_lane)
        self.batch = assignment.batch
        config = assignment.config
        self.sources = {source.label: source for source in config.train} if config.is_mixture else {}
        self._retries_before = RETRIES.retries
        self._noted: set[str] = set()  # sources for which a note said that they are read again
        self.lanes = {
            state_key(lane, name): packer for name in self.mixture.names for lane, packer in self._open(name).items()
        }
        self.taken = {key: assignment.states.get(key, {}).get("blocks", 0) for key in self.lanes}

    def _open(self, name: str) -> Mapping[int, Lane | WholeLane]:
        """The lanes of the assignment within one source."""
        config = self.assignment.config
        shards = shards_of_source(self.assignment.shards, config, name)
        source = self.sources.get(name)
        lanes = self.assignment.lanes_of_all
        states = {lane: self.assignment.states.get(state_key(lane, name)) for lane in self.assignment.lanes}
        if packing_of(config, shards) != "stream":
            rows = WholeRows(shards, config)
            return {lane: WholeLane(rows, lane, lanes, source, state) for lane, state in states.items()}
        plans = lane_plans(config, lanes, len(shards))
        encode, eos = self._encoder(shards)
        open_shard = functools.partial(open_rows, config)
        return {
            lane: Lane(
                LaneRows(plans[lane], shards, config, open_shard, encode, source),
                eos=eos,
                sequence_length=config.sequence_length,
                document_mask=config.document_mask,
                restored=state,
            )
            for lane, state in states.items()
        }

    def _encoder(self, shards: Sequence[Shard]) -> tuple[Encode[Any], int]:
        """The encoder of the rows of these shards, and EOS. Pre-tokenized shards need no tokenizer."""
        first = shards[0].tokens
        if first is not None and all(shard.tokens for shard in shards):
            return list, first.making.eos
        length = self.assignment.config.sequence_length
        encode = encoder_of(self.tokenizer, (shard.records for shard in shards), "stream", length)
        return encode, int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]

    @functools.cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from relora_mora.tokenizer.load import load_tokenizer

        return load_tokenizer(self.assignment.tokenizer_path)

    def produce(self) -> LaneBlocks:
        """The blocks of these lanes for the next global batch. Raises SourceError."""
        lanes = self.assignment.lanes
        blocks = {}
        for lane, sources in zip(lanes, self.mixture.sources(self.batch, lanes), strict=True):
            keys = [state_key(lane, source) for source in sources]
            blocks[lane] = [self.lanes[key].next_block() for key in keys]
            for key in keys:
                self.taken[key] += 1
        self.batch += 1
        notes = []
        states: LaneStates = {}
        for key, packer in self.lanes.items():
            notes += packer.notes
            packer.notes.clear()
            states[key] = packer.state() | ({"blocks": self.taken[key]} if self.sources else {})
        retries = RETRIES.retries - self._retries_before
        return LaneBlocks(blocks, states, retries, [*notes, *self._repetition_notes(states)])

    def _repetition_notes(self, states: LaneStates) -> Iterator[str]:
        """A note, once per source, when its blocks begin to repeat; its rows are read long before that."""
        for name, source in self.sources.items():
            if source.max_epochs is None or source.may_end or name in self._noted:
                continue
            if max(states[state_key(lane, name)]["epoch"] for lane in self.assignment.lanes) >= source.max_epochs:
                self._noted.add(name)
                yield f"{times_read(source)}; it is read again"

    def begin(self) -> None:
        """A worker process begins here."""

    def ready(self, timeout_seconds: float) -> bool:
        return True

    def hung(self, seconds: float) -> None:
        return None

    def close(self) -> None:
        for packer in self.lanes.values():
            packer.close()
