"""The LLaMA family: configs, the model, and its loss."""

from relora_mora.model.config import (
    check_length,
    function_differences,
    keys_with,
    length_of_documents,
    parse_model_config,
    plain_model_config,
    read_json,
    read_model_config,
    stored_model_config,
)
from relora_mora.model.config_keys import ARCHITECTURES, FUNCTION, TRAINING
from relora_mora.model.llama import LossModel, build_model, empty_model, put_values

__all__ = [
    "ARCHITECTURES",
    "FUNCTION",
    "TRAINING",
    "LossModel",
    "build_model",
    "check_length",
    "empty_model",
    "function_differences",
    "keys_with",
    "length_of_documents",
    "parse_model_config",
    "plain_model_config",
    "put_values",
    "read_json",
    "read_model_config",
    "stored_model_config",
]
