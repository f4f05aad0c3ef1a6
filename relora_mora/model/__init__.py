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
from relora_mora.model.llama import LossModel, build_model, empty_model, initial_value, put_values
from relora_mora.model.loss import IGNORE, bytes_per_logit, chunked_cross_entropy, loss_chunk

__all__ = [
    "ARCHITECTURES",
    "FUNCTION",
    "IGNORE",
    "TRAINING",
    "LossModel",
    "build_model",
    "bytes_per_logit",
    "check_length",
    "chunked_cross_entropy",
    "empty_model",
    "function_differences",
    "initial_value",
    "keys_with",
    "length_of_documents",
    "loss_chunk",
    "parse_model_config",
    "plain_model_config",
    "put_values",
    "read_json",
    "read_model_config",
    "stored_model_config",
]
