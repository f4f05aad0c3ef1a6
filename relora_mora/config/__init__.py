"""Typed settings of a run: schema, combinations that cannot work, reading."""

from relora_mora.config.checks import unused_by
from relora_mora.config.data import DataConfig, SampleBy, Split
from relora_mora.config.data_flags import READING, SCORING, check_names, parse_typed, read_data
from relora_mora.config.finetuning import FINETUNING, with_defaults
from relora_mora.config.lengths import tree_of
from relora_mora.config.load import (
    ConfigError,
    config_of,
    dump,
    load_config,
    read_tree,
    stored_config,
    validate,
    with_epochs,
)
from relora_mora.config.records import Packing, RecordsConfig
from relora_mora.config.schema import (
    DECODER_LINEARS,
    Config,
    LogConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from relora_mora.config.sources import (
    TextSource,
    as_sources,
    is_mixture,
    set_setting,
)
from relora_mora.config.yaml_text import explain_yaml, parse_yaml

__all__ = [
    "DECODER_LINEARS",
    "FINETUNING",
    "READING",
    "SCORING",
    "Config",
    "ConfigError",
    "DataConfig",
    "LogConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "Packing",
    "RecordsConfig",
    "SampleBy",
    "Split",
    "TextSource",
    "TrainConfig",
    "as_sources",
    "check_names",
    "config_of",
    "dump",
    "explain_yaml",
    "is_mixture",
    "load_config",
    "parse_typed",
    "parse_yaml",
    "read_data",
    "read_tree",
    "set_setting",
    "stored_config",
    "tree_of",
    "unused_by",
    "validate",
    "with_defaults",
    "with_epochs",
]
