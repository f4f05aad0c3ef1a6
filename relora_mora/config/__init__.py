"""Typed settings of a run: schema, combinations that cannot work, reading."""

from relora_mora.config.checks import unused_by, unused_settings
from relora_mora.config.data import SAMPLE_BY, DataConfig, SampleBy, Split
from relora_mora.config.finetuning import FINETUNING, with_defaults
from relora_mora.config.load import ConfigError, dump, load_config, parse_yaml, validate, with_epochs
from relora_mora.config.records import Packing, RecordsConfig
from relora_mora.config.schema import (
    DECODER_LINEARS,
    CheckpointConfig,
    Config,
    EvalConfig,
    LogConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)
from relora_mora.config.sources import (
    Given,
    TextSource,
    as_sources,
    is_mixture,
    map_records,
    set_setting,
)
from relora_mora.config.typed_sources import parse_records, parse_sources, parse_typed

__all__ = [
    "DECODER_LINEARS",
    "FINETUNING",
    "SAMPLE_BY",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "Given",
    "LogConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "Packing",
    "RecordsConfig",
    "SampleBy",
    "Split",
    "TextSource",
    "TokenizerConfig",
    "TrainConfig",
    "as_sources",
    "dump",
    "is_mixture",
    "load_config",
    "map_records",
    "parse_records",
    "parse_sources",
    "parse_typed",
    "parse_yaml",
    "set_setting",
    "unused_by",
    "unused_settings",
    "validate",
    "with_defaults",
    "with_epochs",
]
