"""Trained models: checkpoints as plain LLaMA with the adapters merged in, and models in Hugging Face folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from relora_mora.checkpoint import CheckpointError, CheckpointReader, list_checkpoints, read_manifest, tokenizer_of
from relora_mora.checkpoint.find import find_checkpoint, newest_manifest
from relora_mora.checkpoint.layout import MANIFEST
from relora_mora.config import Config, ConfigError, DataConfig, Given, ModelConfig, TextSource, validate
from relora_mora.data.hub_sources import hub_repo
from relora_mora.methods.inject import inject
from relora_mora.methods.layers import adapter_layers, adapter_parameters
from relora_mora.model import (
    ARCHITECTURES,
    empty_model,
    parse_model_config,
    plain_model_config,
    put_values,
    read_json,
    read_model_config,
    stored_model_config,
)
from relora_mora.model.config import architecture_of
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.tokenizer import quiet_transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

transformers_logging.disable_progress_bar()  # it would draw one for each file

HF_LENGTH = 2048  # longest sequence that a foreign model is scored with by default


def checked_model(reader: CheckpointReader) -> PreTrainedModel:
    """The model that a checkpoint names, with its adapter layers and without values.

    Raises :class:`CheckpointError` where the checkpoint does not hold the tensors of that model.
    """
    manifest = reader.manifest
    config = validate(manifest.config, str(reader.folder))
    skeleton = _empty_model(reader)
    if config.method.uses_adapters:
        with torch.device("meta"):
            inject(skeleton, config.method, seed=config.train.seed, mora_type=manifest.operator, draw=manifest.draw)
    expected = {name: list(parameter.shape) for name, parameter in skeleton.named_parameters()}
    found = manifest.parameters | manifest.frozen
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{reader.folder}: does not hold the model it names: {wrong[0]} is {found.get(wrong[0], 'nothing')} there, "
            f"expected {expected.get(wrong[0], 'nothing')}; use another checkpoint"
        )
    return skeleton


def merged_weights(reader: CheckpointReader) -> dict[str, Tensor]:
    """Every weight of the plain model in float32, ``W + delta`` where there is an adapter.

    Raises :class:`CheckpointError` where the checkpoint does not hold the tensors of the model it names.
    """
    manifest = reader.manifest
    skeleton = checked_model(reader)
    adapters = dict(adapter_layers(skeleton))
    own = adapter_parameters(skeleton)
    weights = {name: reader.weight(name) for name in [*manifest.parameters, *manifest.frozen] if name not in own}
    for name, layer in adapters.items():
        weights[f"{name}.weight"] += layer.delta_of(*(reader.weight(f"{name}.{key}") for key in layer.adapter_names))
    return weights


def merged_model(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The plain model of a checkpoint folder that :func:`find_checkpoint` has verified.

    Raises :class:`CheckpointError` for weights that are too large for ``dtype``.
    """
    reader = CheckpointReader(path)
    model = _empty_model(reader)
    weights = {name: value.to(dtype) for name, value in merged_weights(reader).items()}
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{path}: weights too large for {kind} in {in_short(broken)}; choose another type, or an older checkpoint"
        )
    put_values(model, weights)
    model.config.dtype = dtype
    return model.eval()


def _empty_model(reader: CheckpointReader) -> PreTrainedModel:
    """The model that a checkpoint names, without values.

    Raises :class:`CheckpointError` where its settings make no model.
    """
    try:
        return empty_model(stored_model_config(reader.manifest.model_config))
    except Exception as error:  # of nearly any kind
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{reader.folder}: transformers makes no model of its model_config: {said}; use another checkpoint"
        ) from error


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM to score text with.

    ``tokenizer`` is a context manager that gives the tokenizer's folder; ``data`` says how the training text was read.
    ``checkpoint`` is that of this trainer which the weights are from, and its step.
    """

    model: PreTrainedModel
    tokenizer: AbstractContextManager[Path]
    data: DataConfig
    description: str
    checkpoint: tuple[Path, int] | None = None

    def data_settings(
        self,
        validation: Given | None,
        sequence_length: int | None,
        document_mask: bool | None,
        text_column: str | None = None,
        sample_by: str | None = None,
    ) -> DataConfig:
        """Settings for reading held-out text: those of training, except for what is given."""
        given = {
            "sequence_length": sequence_length,
            "document_mask": document_mask,
            "text_column": text_column,
            "sample_by": sample_by,
        }
        data = self.data.model_copy(update={name: value for name, value in given.items() if value is not None})
        return data if validation is None else self._with_validation(data, validation)

    def _with_validation(self, data: DataConfig, validation: Given) -> DataConfig:
        """With other held-out text. The run's revisions hold for its own sources alone."""
        own = [source for source in data.sources("validation") if hub_repo(source)]
        known = {source.source: source.revision or data.revision for source in own}

        def pinned(source: TextSource) -> TextSource:
            return source.model_copy(update={"revision": source.revision or known.get(source.source)})

        sets = data.model_copy(update={"validation": validation}).validation_sets
        pinned_sets = {name: [pinned(source) for source in sources] for name, sources in sets.items()}
        revision = DataConfig.model_fields["revision"].default
        return data.model_copy(update={"validation": pinned_sets, "revision": revision})


def is_foreign(path: Path) -> bool:
    """Whether a folder is that of a Hugging Face model, not a checkpoint with a stray config.json."""
    return (path / "config.json").exists() and not (path / MANIFEST).exists()


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
    if not is_foreign(path):
        return stored_model_config(newest_manifest(path).model_config)
    file = path / "config.json"
    values = read_json(file, "model.init_from")
    if values.get("model_type") is None:
        fault = f"model.init_from: there is no model_type; say in it which of {', '.join(ARCHITECTURES)} the model is"
        raise ConfigError([fault], str(file))
    keys = architecture_of(values, str(file)).keys
    return parse_model_config({key: value for key, value in values.items() if key in keys}, str(file))


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


def load_foreign(
    path: Path, dtype: torch.dtype, kind: Any = AutoModelForCausalLM, *, whole: bool = False
) -> PreTrainedModel:
    """The model in a Hugging Face folder.

    Raises :class:`CheckpointError`, also for a weight that is missing or has another shape, which transformers would
    draw at random, and for an adapter beside the model, which it may leave out. A weight that the model has no place
    for is named in a warning; with ``whole`` it is refused.
    """
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path}: holds an adapter of PEFT beside its model; save the model with the adapter merged in"
        )
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # of nearly any kind
        said = " ".join(str(error).split())
        file = _damaged_file(path) or path
        raise CheckpointError(f"{file}: transformers cannot load it as a causal language model: {said}") from error
    _refuse_weights(
        path,
        {
            "missing": info["missing_keys"],
            "of another shape": [key for key, *_ in info["mismatched_keys"]],
            "left over": info["unexpected_keys"] if whole else (),
        },
    )
    if info["unexpected_keys"]:
        log.warning(
            "%s: its model has no place for these weights, which are left out: %s",
            path,
            in_short(info["unexpected_keys"]),
        )
    return model


def check_headers(path: Path) -> None:
    """Looks at names and shapes in the safetensors of a Hugging Face folder, without reading a weight.

    Raises :class:`CheckpointError` where they are not those of the model in its config.json, as :func:`load_foreign`
    would after it has read them.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in _safetensors(path) if is_foreign(path) else ():
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()  # a safetensors handle is no mapping
                found |= {_bare(name): tuple(tensors.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors ({error}); fetch it again") from error
    if not found:
        return
    lm = empty_model(start_config(path))
    expected = {_bare(name): (name, tuple(p.shape)) for name, p in lm.named_parameters()}
    if lm.config.tie_word_embeddings and "embed_tokens.weight" not in found and "lm_head.weight" in found:
        found["embed_tokens.weight"] = found["lm_head.weight"]  # of the two names a file may have either
    _refuse_weights(
        path,
        {
            "missing": [name for key, (name, _) in expected.items() if key not in found],
            "of another shape": [name for key, (name, shape) in expected.items() if found.get(key, shape) != shape],
        },
    )


def _safetensors(path: Path) -> list[Path]:
    """The files that transformers reads in a folder."""
    whole = path / "model.safetensors"
    index = path / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole] if whole.exists() else []
    shards = read_json(index, "model.init_from").get("weight_map")
    return [path / name for name in sorted(set(shards.values()))] if isinstance(shards, dict) else []


def _bare(name: str) -> str:
    """A weight's name without those of the models around it."""
    return re.sub(r"^(?:model\.)+", "", name)


def _refuse_weights(path: Path, wrong: Mapping[str, Sequence[str]]) -> None:
    """Raises :class:`CheckpointError` where there are any, by what is wrong with them."""
    if any(wrong.values()):
        said = "; ".join(f"{what}: {in_short(names)}" for what, names in wrong.items() if names)
        raise CheckpointError(
            f"{path}: its weights are not those that its config.json asks for; {said}; "
            "fetch it again, or correct that file"
        )


def in_short(names: Iterable[str]) -> str:
    """Names of weights; one that several layers have is named once, with a star for the layer and how often."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    return ", ".join(same[0] if len(same) == 1 else f"{kind} ({len(same)})" for kind, same in kinds.items())


def _damaged_file(folder: Path) -> Path | None:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return file
    return None


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens a model can see at once; None where its config has no limit, which some write as -1."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None


def load_any_model(path: Path, dtype: torch.dtype) -> LoadedModel:
    """The model of a checkpoint, run folder or Hugging Face folder. Nothing is downloaded and no code of it is run.

    Raises :class:`CheckpointError` for anything else.
    """
    if is_foreign(path):
        model = load_foreign(path, dtype)
        plain = DataConfig(
            train="none", validation="none", sequence_length=min(HF_LENGTH, positions_of(model) or HF_LENGTH)
        )
        return LoadedModel(model, nullcontext(path), plain, f"{path} ({type(model).__name__})")
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    data = validate(manifest.config, str(checkpoint)).data
    return LoadedModel(
        merged_model(checkpoint, dtype),
        tokenizer_of(checkpoint),
        data,
        f"{checkpoint} (step {manifest.step})",
        (checkpoint, manifest.step),
    )
