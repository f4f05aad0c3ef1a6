"""Models in Hugging Face folders that this trainer did not write."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from relora_mora.checkpoint.layout import MANIFEST, CheckpointError
from relora_mora.config.load import ConfigError, read_json
from relora_mora.model.config import family_of, parse_model_config
from relora_mora.system.logs import log
from relora_mora.tokenizer.load import quiet_transformers

transformers_logging.disable_progress_bar()  # it would draw one per file


def abbreviate(names: Iterable[str]) -> str:
    """Lists names of weights. A name that several layers share appears once, with a star and the number of layers."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    return ", ".join(same[0] if len(same) == 1 else f"{kind} ({len(same)})" for kind, same in kinds.items())


def is_foreign(path: Path) -> bool:
    """Whether a folder holds a Hugging Face model. A checkpoint with a stray config.json does not count."""
    return (path / "config.json").exists() and not (path / MANIFEST).exists()


def foreign_config(path: Path) -> PreTrainedConfig:
    """The config of the model in a Hugging Face folder, without the keys that transformers ignores.

    If its generation_config.json lists several ids that end an answer, they become ``eos_token_id``, as in
    transformers. Raises :class:`ConfigError`.
    """
    file = path / "config.json"
    values = read_json(file, "model.init_from")
    if values.get("model_type") is None:
        fault = "model.init_from: it has no model_type; set it there, to llama for example"
        raise ConfigError([fault], str(file))
    known = family_of(values, str(file)).known
    values = {key: value for key, value in values.items() if key in known}
    generation = path / "generation_config.json"
    ends = read_json(generation, "model.init_from").get("eos_token_id") if generation.exists() else None
    return parse_model_config(values | ({"eos_token_id": ends} if isinstance(ends, list) else {}), str(file))


def any_config(path: Path) -> PreTrainedConfig:
    """The config of any model in a Hugging Face folder, as transformers reads it; raises :class:`CheckpointError`."""
    try:
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly any kind
        raise CheckpointError(f"{path}: transformers cannot read its config: {' '.join(str(error).split())}") from error
    return config


def load_foreign(path: Path, dtype: torch.dtype, *, whole: bool = False) -> PreTrainedModel:
    """The model in a Hugging Face folder.

    Raises :class:`CheckpointError`, also if a weight is missing or has another shape, which transformers would draw at
    random, and if there is an adapter next to the model, which transformers may ignore. A weight that does not belong
    to the model causes a warning, or with ``whole`` an error.
    """
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path}: holds a PEFT adapter next to its model; save the model with the adapter merged in"
        )
    check_files(path)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises nearly any kind
        message = " ".join(str(error).split())
        raise CheckpointError(f"{path}: transformers cannot load it as a causal language model: {message}") from error
    model, info = loaded
    left_over = info["unexpected_keys"]
    wrong = {
        "missing": info["missing_keys"],
        "of another shape": [key for key, *_ in info["mismatched_keys"]],
        "left over": left_over if whole else (),
    }
    faults = "; ".join(f"{fault}: {abbreviate(names)}" for fault, names in wrong.items() if names)
    if faults:
        raise CheckpointError(
            f"{path}: its weights do not fit its config.json; {faults}; fetch it again, or correct that file"
        )
    if left_over:
        log.warning("%s: these weights do not belong to its model and are left out: %s", path, abbreviate(left_over))
    return model


def check_files(path: Path) -> None:
    """Raises :class:`CheckpointError` if a safetensors file of a Hugging Face folder is missing or cut short.

    Reads no weight.
    """
    names = {SAFE_WEIGHTS_NAME} if (path / SAFE_WEIGHTS_NAME).exists() else set()
    index = path / SAFE_WEIGHTS_INDEX_NAME
    if not names and index.exists():
        names = set((read_json(index, "model.init_from").get("weight_map") or {}).values())
    for file in sorted(path / name for name in names):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors ({error}); fetch it again") from error


def has_weights(path: Path) -> bool:
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    return any((path / name).exists() for name in names)
