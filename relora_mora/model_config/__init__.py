"""The config of a LLaMA: what it may hold, reading it, and what two of them differ in."""

from relora_mora.model_config.keys import FUNCTION, KEYS, NOTHING, ONLY, TRAINING
from relora_mora.model_config.read import check_length, function_differences, keys_with, parse_model_config, read_json, read_model_config

__all__ = [
    "FUNCTION",
    "KEYS",
    "NOTHING",
    "ONLY",
    "TRAINING",
    "check_length",
    "function_differences",
    "keys_with",
    "parse_model_config",
    "read_json",
    "read_model_config",
]
