"""The loggers that a run writes its metrics to beside ``metrics.jsonl``, by its settings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from relora_mora.config import ConfigError, LogConfig
from relora_mora.train.metrics import Logger
from relora_mora.train.tensorboard import TensorBoard
from relora_mora.train.weights_and_biases import WeightsAndBiases


def check_loggers(config: LogConfig) -> None:
    """Raises :class:`ConfigError` where a package is missing. First rank only, which alone writes."""
    if config.wandb is None:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder of this name is no package: W&B itself makes one
        fault = (
            "log.wandb: the package wandb is not installed; pip install wandb, or pip install -e '.[wandb]' in the "
            "checkout, or set log.wandb=null"
        )
        raise ConfigError([fault], "the settings")


def make_loggers(folder: Path, config: LogConfig) -> list[Logger]:
    """Those that the settings ask for; nothing is opened yet."""
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoard(folder))
    if config.wandb is not None:
        loggers.append(WeightsAndBiases(folder, config.wandb))
    return loggers
