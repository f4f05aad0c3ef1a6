"""The model that a run starts from: its config, its tokenizer and its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from relora_mora.checkpoint import CheckpointReader, list_checkpoints
from relora_mora.checkpoint.find import find_checkpoint, newest_manifest
from relora_mora.config import Config, ModelConfig
from relora_mora.model import parse_model_config, plain_model_config, read_model_config, stored_model_config
from relora_mora.model.llama import model_class
from relora_mora.pretrained.foreign import foreign_config, is_foreign, load_foreign
from relora_mora.pretrained.merged import merged_weights
from relora_mora.system.run_folder import RunFolder


def model_config_of(settings: ModelConfig) -> PreTrainedConfig:
    """The config of a run's model: that of ``model.config`` or else of ``model.init_from``, with the overrides applied.

    Raises :class:`ConfigError`, and :class:`CheckpointError` where ``model.init_from`` is neither model nor run.
    """
    if settings.config is not None:
        return read_model_config(settings)
    path = Path(str(settings.init_from))
    return parse_model_config(plain_model_config(start_config(path)) | settings.overrides, str(path))


def start_config(path: Path) -> PreTrainedConfig:
    """The config of the model in a Hugging Face folder, whose foreign keys transformers ignores, a checkpoint or a run.

    Raises what :func:`model_config_of` raises.
    """
    if is_foreign(path):
        return foreign_config(path)
    return stored_model_config(newest_manifest(path).model_config)


def with_tokenizer(config: Config) -> Config:
    """With the tokenizer of ``model.init_from`` where ``tokenizer.path`` is null."""
    if config.tokenizer.path is not None:
        return config
    path = tokenizer_beside(Path(str(config.model.init_from)))
    return config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": str(path)})})


def tokenizer_beside(path: Path) -> Path:
    """Where a Hugging Face folder, a run, its ``checkpoints/`` or a checkpoint has its tokenizer."""
    if is_foreign(path):
        return path
    return RunFolder(path.parent if list_checkpoints(path) else path).tokenizer  # a checkpoint's has the same name


def start_weights(path: Path, model_config: PreTrainedConfig) -> dict[str, Tensor]:
    """The float32 weights of a start, which is a model's folder, a run or a checkpoint, by the names of ours."""
    if is_foreign(path):
        return load_foreign(path, torch.float32, model_class(model_config), whole=True).state_dict()
    return merged_weights(CheckpointReader(find_checkpoint(path)))
