"""Typed settings of a run: schema, combinations that cannot work, reading."""

from relora_mora.config.checks import unused_settings
from relora_mora.config.load import ConfigError, dump, load_config, parse_yaml, validate
from relora_mora.config.schema import (
    DECODER_LINEARS,
    SAMPLE_BY,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "DECODER_LINEARS",
    "SAMPLE_BY",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "TokenizerConfig",
    "TrainConfig",
    "dump",
    "load_config",
    "parse_yaml",
    "unused_settings",
    "validate",
]
