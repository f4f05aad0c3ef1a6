"""Tiny runs of one test, on the ranks of its pools."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.config.schema import Config
from tests.tools.pool import Pools
from tests.tools.runs import refusal_of, run_config, train


class Runs(NamedTuple):
    pools: Pools
    inputs: Path
    tokenizer: str

    def config(self, folder: Path, world_size: int = 1, **sections: dict[str, Any]) -> Config:
        """See :func:`run_config`."""
        return run_config(self.inputs, self.tokenizer, folder, world_size, **sections)

    def train(self, folder: Path, ranks: int = 1, *, stop_after: int | None = None, **sections: dict[str, Any]) -> None:
        self.pools(ranks)(train, self.config(folder, ranks, **sections), stop_after=stop_after)

    def refusal(self, config: Config, error: type[ValueError] = CheckpointError) -> str:
        """See :func:`refusal_of`."""
        [message] = self.pools(1)(refusal_of, config, error)
        return message
