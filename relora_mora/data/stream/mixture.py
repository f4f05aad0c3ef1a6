"""Which source of a mixture each block of a global batch comes from, as a function of only the step and the weights.

There is no state to save, so a run may move to any number of ranks, and weights may change at a resume.
"""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from relora_mora.config.data import DataConfig, TextSource
from relora_mora.data.lanes import seeded_order
from relora_mora.data.shard import Shard

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
        weights = {source.label: source.weight for source in config.train_sources} if config.is_mixture else {"": 1.0}
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
    return [source.label for source in config.train_sources] if config.is_mixture else [""]


def in_saved_order(config: DataConfig, saved: Mapping[str, Any]) -> DataConfig:
    """The same mixture with its sources in the order of the saved settings, if these name the same sources.

    A mixture reads the same text in any order. But among sources with equal weights the first one comes first in a
    batch, and fingerprints depend on the order of shards, so a run keeps the order that it started with.
    """
    listed = saved.get("train")
    records = [record for record in listed if isinstance(record, Mapping)] if isinstance(listed, list) else []
    names = [TextSource.model_validate(record).label for record in records]
    sources = {source.label: source for source in config.train_sources}
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
