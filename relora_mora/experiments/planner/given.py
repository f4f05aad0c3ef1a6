"""The run that the first argument of ``relora-mora plan`` means: a settings file, or any name that is shipped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from relora_mora.config.lengths import with_counted_epochs
from relora_mora.config.load import FINETUNING, ConfigError, config_of, read_tree
from relora_mora.config.schema import Config, ModelConfig
from relora_mora.config.shipped import MODELS, SETTINGS, find_config, shipped_files
from relora_mora.model.config import check_length, read_model_config

STEPS = 1000  # of a plan for a number of epochs
# models that shipped settings start from, and the shipped shapes that are nearest to them, with overrides
_LONGER = {"max_position_embeddings": 4096}
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": ("llama_7b", {"vocab_size": 32000, **_LONGER}),
    "smollm2": ("llama_130m", {"vocab_size": 49152}),
    "tiny_base": ("llama_tiny", _LONGER),
    "memory_base": ("llama_tiny", _LONGER),
    "textbooks_base": ("llama_tiny", _LONGER),
}


def read_run(
    given: str, overrides: Mapping[str, str], *, world_size: int, finetune: bool
) -> tuple[Config, PreTrainedConfig, list[str]]:
    """The settings, the model's config, and what the plan assumes, in words. Raises :class:`ConfigError`."""
    path = find_config(given, (*SETTINGS, *MODELS))
    finetune = finetune or path in shipped_files(["task"]).values()
    notes = []
    tree = read_tree(path)
    is_model = bool(tree.keys() & {"model_type", "hidden_size"})
    defaults = None
    if is_model:
        tree = _run_of_model(path)
        defaults = {"method": tree.pop("method")}
    if "grid" in tree:
        from relora_mora.experiments.study.design import count, first_round, read_study

        study = read_study(path)
        cell, *_ = first_round(study)
        tree, path, finetune = study.base_tree, find_config(study.base), study.command == "finetune"
        overrides = {**cell.overrides(study), **overrides}
        notes.append(f"{given} is a study of {count(study)} runs: this is the first, {cell.name}")
    config = config_of(tree, path, overrides, world_size, FINETUNING if finetune else defaults)
    if is_model:
        method = config.method
        rank = "" if method.record.adapter is None else f" of rank {method.rank}"
        notes.append(f"{given} is a model: the method is {method.record.title}{rank}, on any text")
    if config.train.epochs is not None:
        notes.append(
            f"train.epochs: a run counts its text at the start; this is {STEPS:,} steps, unless you give --train.steps"
        )
        config = with_counted_epochs(config, STEPS * config.tokens_per_step)
    if config.model.new_tokens is not None:
        from relora_mora.weights.vocabulary import with_vocabulary

        config = with_vocabulary(config)
    return config, _model_config(config, notes), notes


def _run_of_model(path: Path) -> dict[str, Any]:
    """Settings for a model's file: the defaults, as far as the model is large enough for them."""
    model = read_model_config(ModelConfig(config=str(path)))
    return {
        "model": {"config": str(path)},
        "tokenizer": {"path": "none"},
        "data": {"train": "none", "validation": "none", "sequence_length": min(512, model.max_position_embeddings)},
        "method": {"name": "remora", "rank": max(1, min(128, model.hidden_size // 4))},
        "train": {"run_dir": f"runs/{path.stem}"},
    }


def _model_config(config: Config, notes: list[str]) -> PreTrainedConfig:
    """The config of the run's model. Its weights need not be on this machine."""
    settings = config.model
    start = Path(str(settings.init_from))
    if settings.config is None and start.name in _SHAPES and not start.exists():
        name, changes = _SHAPES[start.name]
        notes.append(f"{start} is not on this machine: this is with the shapes of {name}; --model.config names others")
        settings = ModelConfig(config=str(find_config(name, MODELS)), overrides=changes | settings.overrides)
    if settings.config is not None:
        found = read_model_config(settings)
    else:
        from relora_mora.train.begin.settings import check_start
        from relora_mora.weights.load import model_config_of

        try:
            check_start(config)
        except ConfigError as error:
            remedy = "; or give its shapes to the plan, such as --model.config=llama_7b"
            raise ConfigError([f"{fault}{remedy}" for fault in error.faults], error.source) from None
        found = model_config_of(settings)
    source = settings.config or str(start)
    check_length(found, config.data.sequence_length, source, separate_documents=config.data.masks_documents)
    return found
