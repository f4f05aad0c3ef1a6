"""Training streams for the tests of the data package."""

from __future__ import annotations

from typing import Any

from relora_mora.config.data import DataConfig
from relora_mora.data.sets.reading import count_epochs
from relora_mora.data.stream.stream import TrainStream

BATCH, LANES = 8, 4


def stream_of(config: DataConfig, tokenizer: str, rank: int = 0, ranks: int = 1, **settings: Any) -> TrainStream:
    """One rank's stream of training data."""
    given = {"batch_size": BATCH, "lanes": LANES, **settings}
    return TrainStream(config, tokenizer_path=tokenizer, rank=rank, world_size=ranks, **given)


def count_of(config: DataConfig, tokenizer: str, epochs: int) -> Any:
    """The blocks and tokens of so many epochs."""
    return count_epochs(config, tokenizer, lanes=LANES, blocks_per_lane=BATCH // LANES, epochs=epochs)
