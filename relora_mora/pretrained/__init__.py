"""Trained models: checkpoints as plain LLaMA with the adapters merged in, and models in Hugging Face folders."""

from relora_mora.pretrained.foreign import check_headers, has_weights, is_foreign, load_foreign, positions_of
from relora_mora.pretrained.load import LoadedModel, load_any_model
from relora_mora.pretrained.merged import DTYPES, checked_model, merged_model, merged_weights
from relora_mora.pretrained.names import in_short
from relora_mora.pretrained.start import model_config_of, start_config, start_weights, tokenizer_beside, with_tokenizer

__all__ = [
    "DTYPES",
    "LoadedModel",
    "check_headers",
    "checked_model",
    "has_weights",
    "in_short",
    "is_foreign",
    "load_any_model",
    "load_foreign",
    "merged_model",
    "merged_weights",
    "model_config_of",
    "positions_of",
    "start_config",
    "start_weights",
    "tokenizer_beside",
    "with_tokenizer",
]
