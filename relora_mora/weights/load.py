"""Loads trained models: the one that a run starts from, one to score text with, and a base with an adapter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from relora_mora.checkpoint.layout import TOKENIZER, CheckpointError, list_checkpoints
from relora_mora.checkpoint.reader import CheckpointReader, find_checkpoint, newest_manifest
from relora_mora.config.data import CHATML, DataConfig, TextSource
from relora_mora.config.load import SCORING, read_data, stored_config
from relora_mora.config.schema import ModelConfig
from relora_mora.model.config import (
    parse_model_config,
    plain_model_config,
    positions_in,
    read_model_config,
    stored_model_config,
)
from relora_mora.system.run_folder import RunFolder
from relora_mora.tokenizer.files import has_tokenizer
from relora_mora.weights.export import merged_model, merged_weights, model_without_values
from relora_mora.weights.foreign import any_config, foreign_config, is_foreign, load_foreign
from relora_mora.weights.peft import AdapterFolder, is_adapter

T = TypeVar("T", DataConfig, TextSource)
HF_LENGTH = 2048  # default limit of the sequence length for scoring a foreign model


def model_config_of(settings: ModelConfig) -> PreTrainedConfig:
    """The config of a run's model from ``model.config``, or else ``model.init_from``, with the overrides applied.

    Raises :class:`ConfigError`, and :class:`CheckpointError` if ``model.init_from`` is neither a model nor a run.
    """
    if settings.config is not None:
        return read_model_config(settings)
    path = Path(str(settings.init_from))
    return parse_model_config(plain_model_config(start_config(path)) | settings.overrides, str(path))


def start_config(path: Path) -> PreTrainedConfig:
    """The config of the model in a Hugging Face folder, a checkpoint or a run.

    Raises the errors of :func:`model_config_of`.
    """
    if is_foreign(path):
        return foreign_config(path)
    return stored_model_config(newest_manifest(path).model_config)


def own_tokenizer_path(path: Path) -> Path:
    """The tokenizer folder of a Hugging Face folder, a run, its ``checkpoints/`` or a checkpoint."""
    if is_foreign(path):
        return path
    return RunFolder(path.parent if list_checkpoints(path) else path).tokenizer  # it has the same name in a checkpoint


def start_weights(path: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of a Hugging Face folder, a run or a checkpoint, by the parameter names of this package."""
    if is_foreign(path):
        return load_foreign(path, torch.float32, whole=True).state_dict()
    return merged_weights(CheckpointReader(find_checkpoint(path)))


@dataclass(frozen=True)
class ModelSource:
    """A causal LM to score text with; ``read(dtype)`` reads its weights.

    ``tokenizer`` is the tokenizer's folder; ``data`` says how the training text was read.
    ``checkpoint`` is the checkpoint of this trainer that the weights are from, and its step. ``run`` is its run, also
    of an adapter on such weights; the model's config may then name other special tokens than the tokenizer.
    """

    read: Callable[[torch.dtype], PreTrainedModel]
    config: PreTrainedConfig
    tokenizer: Path
    data: DataConfig
    description: str
    checkpoint: tuple[Path, int] | None = None
    run: RunFolder | None = None

    def data_settings(self, validation: Any, overrides: Mapping[str, str], *, own_tokenizer: bool = True) -> DataConfig:
        """Settings for reading held-out text: the settings of training, overridden by the command line.

        ``validation`` has the form of the setting ``data.validation``; None means the run's own. With
        ``own_tokenizer``, conversations get the chat template that is saved with the run's tokenizer. Raises
        :class:`ConfigError`.
        """
        trained = _with_saved_template(self.data) if own_tokenizer else self.data
        given = trained.model_dump(include={*SCORING, "validation", "commits"}) | {"train": "none"}
        if any(name.startswith("data.records") for name in overrides):
            del given["packing"]
        kind = overrides.get("data.records.kind")
        if kind is not None and given["records"] is not None and given["records"]["kind"] != kind:
            given["records"] = None  # columns and template belong to their kind
        if overrides.get("data.packing") == "none":
            del given["document_mask"]
        if validation is not None:
            given["validation"] = validation
        return read_data(given, overrides, SCORING)


def _with_saved_template(data: DataConfig) -> DataConfig:
    """Replaces the training's chat template file by null, since the run's tokenizer holds that template."""
    trained = map(data.records_of, data.train)
    file = next((each.template for each in trained if each is not None and each.is_conversation), None)

    def own(reads: T) -> T:
        records = reads.records
        if file in (None, CHATML) or records is None or records.template != file:
            return reads
        return reads.model_copy(update={"records": records.model_copy(update={"template": None})})

    sets = {name: list(map(own, sources)) for name, sources in data.validation.items()}
    return own(data).model_copy(update={"validation": sets})


def find_model(path: Path, base: Path | None = None) -> ModelSource:
    """The model of a checkpoint, run, Hugging Face folder or adapter without its model.

    Nothing is downloaded, and no code of a folder is run. ``base`` is the model that an adapter was trained on; the
    default is the one that its config names. Raises :class:`CheckpointError` for anything else, also while the weights
    are read.
    """
    if not is_adapter(path):
        if base is not None:
            raise CheckpointError(f"--base: {path} is not an adapter without its model; omit --base")
        return _whole_model(path)
    adapter = AdapterFolder(path)
    if base is None and (adapter.base is None or not Path(adapter.base).is_dir()):
        named = "it names no model" if adapter.base is None else f"its model {adapter.base} is not a folder here"
        raise CheckpointError(f"{path}: an adapter without its model, and {named}; give the model's folder with --base")
    of_base = _whole_model(base or Path(str(adapter.base)))

    def read(dtype: torch.dtype) -> PreTrainedModel:
        lm = of_base.read(torch.float32)
        adapter.merge_into(lm, str(base or adapter.base))
        for parameter in lm.parameters():  # not the buffers: rotary frequencies stay in float32
            parameter.data = parameter.data.to(dtype)
        if (path / GENERATION_CONFIG_NAME).is_file():  # the adapter was trained to stop at other tokens than its base
            lm.generation_config = GenerationConfig.from_pretrained(path)
        return lm

    return replace(
        of_base,
        read=read,
        tokenizer=path if has_tokenizer(path) else of_base.tokenizer,
        description=f"{path} on {of_base.description}",
        checkpoint=None,
    )


def _whole_model(path: Path) -> ModelSource:
    if is_foreign(path):
        config = any_config(path)
        length = min(HF_LENGTH, positions_in(config) or HF_LENGTH)
        data = DataConfig.model_validate({"train": "none", "validation": "none", "sequence_length": length})
        return ModelSource(partial(load_foreign, path), config, path, data, f"{path} ({config.model_type})")
    reader = CheckpointReader(find_checkpoint(path))
    return ModelSource(
        partial(merged_model, reader),
        model_without_values(reader).config,
        reader.folder / TOKENIZER,
        stored_config(reader.manifest.config, str(reader.folder)).data,
        f"{reader.folder} (step {reader.manifest.step})",
        (reader.folder, reader.manifest.step),
        RunFolder.of(reader.folder),
    )
