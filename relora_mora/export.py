"""From a checkpoint of any method to a plain LLaMA: adapters merged in float32, nothing of this project left in it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from relora_mora.adapters import adapter_layers, adapter_parameters, inject
from relora_mora.checkpoint import CheckpointError, CheckpointReader, list_checkpoints, newest_whole, read_manifest, verify
from relora_mora.checkpoint.places import list_new
from relora_mora.cli import new_folder
from relora_mora.config import DataConfig, validate
from relora_mora.model import empty_model, put_values
from relora_mora.tokenizer import quiet_transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
transformers_logging.disable_progress_bar()  # a bar for each file says nothing here

HF_LENGTH = 2048  # longest sequence that a foreign model is scored with by default


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means: a checkpoint folder, or the newest whole one of a run or ``checkpoints/`` folder.

    Raises :class:`CheckpointError` when there is none or when it is damaged.
    """
    for folder in (path, path / "checkpoints"):
        if list_checkpoints(folder) or list_new(folder):
            found, skipped = newest_whole(folder)
            if found is None:
                raise CheckpointError(f"{folder}: no checkpoint in it is whole: {'; '.join(skipped)}")
            return found
    if not path.is_dir():
        what = "is no folder" if path.exists() else "not found"
        raise CheckpointError(f"{path}: {what}; give a run folder, or a checkpoint such as RUN/checkpoints/step-00001000")
    problem = verify(path)
    if problem is not None:
        raise CheckpointError(problem if problem.startswith(str(path)) else f"{path}: {problem}; use an older checkpoint")
    return path


def merged_weights(reader: CheckpointReader) -> dict[str, Tensor]:
    """Every weight of the plain model in float32, ``W + delta`` where there is an adapter."""
    manifest = reader.manifest
    config = validate(manifest.config, str(reader.folder))
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(**manifest.model_config))
        if config.uses_adapters:
            inject(skeleton, config.method, seed=config.train.seed, mora_type=manifest.operator)
    adapters = dict(adapter_layers(skeleton))
    own = adapter_parameters(skeleton)
    weights = {name: reader.weight(name) for name in [*manifest.parameters, *manifest.frozen] if name not in own}
    for name, layer in adapters.items():
        weights[f"{name}.weight"] += layer.delta_of(*(reader.weight(f"{name}.{key}") for key in layer.adapter_names))
    return weights


def merged_model(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The plain model of a checkpoint folder, which :func:`find_checkpoint` has verified."""
    reader = CheckpointReader(path)
    model = empty_model(LlamaConfig(**reader.manifest.model_config))
    weights = {name: value.to(dtype) for name, value in merged_weights(reader).items()}
    unknown = sorted(set(weights) - set(dict(model.named_parameters())))
    put_values(model, weights)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing or unknown:
        raise CheckpointError(f"{path}: does not hold the model it names (missing {missing[:3]}, unknown {unknown[:3]})")
    model.config.dtype = dtype
    return model.eval()


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM to score text with, and what goes with it."""

    model: PreTrainedModel
    tokenizer: Path
    sequence_length: int
    description: str

    def data_settings(self, data: str, sequence_length: int) -> DataConfig:
        """Settings under which ``data`` is read."""
        return DataConfig(train=data, validation=data, sequence_length=sequence_length)


def load_foreign(path: Path, dtype: torch.dtype, kind: Any = AutoModelForCausalLM, *, whole: bool = False) -> PreTrainedModel:
    """The model in a Hugging Face folder. Raises :class:`CheckpointError` also where a weight is missing or has another shape:
    transformers would draw it at random. With ``whole`` also where one is left over, or an adapter, which transformers may leave out."""
    if whole and (path / "adapter_config.json").exists():
        raise CheckpointError(f"{path}: holds an adapter of PEFT beside its model; save the model with the adapter merged in")
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                path, dtype=dtype, local_files_only=True, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except Exception as error:  # of nearly any kind
        said = " ".join(str(error).split())
        file = _damaged_file(path) or path
        raise CheckpointError(f"{file}: transformers cannot load it as a causal language model: {said}") from error
    wrong = {
        "missing": info["missing_keys"],
        "of another shape": [key for key, *_ in info["mismatched_keys"]],
        "left over": info["unexpected_keys"] if whole else (),
    }
    if any(wrong.values()):
        said = "; ".join(f"{what}: {in_short(names)}" for what, names in wrong.items() if names)
        raise CheckpointError(
            f"{path}: its weights are not those that its config.json asks for; {said}; fetch it again, or correct that file"
        )
    return model


def in_short(names: Iterable[str]) -> str:
    """Names of weights; those of several layers once, with a star for the layer and their number."""
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


def load_any_model(path: Path, dtype: torch.dtype) -> LoadedModel:
    """A checkpoint or run folder of this trainer, or a Hugging Face folder; nothing is fetched and no code of it is run.

    Raises :class:`CheckpointError` for anything else.
    """
    if (path / "config.json").is_file():
        model = load_foreign(path, dtype)
        length = min(HF_LENGTH, int(getattr(model.config, "max_position_embeddings", HF_LENGTH)))
        return LoadedModel(model, path, length, f"{path} ({type(model).__name__})")
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    length = validate(manifest.config, str(checkpoint)).data.sequence_length
    return LoadedModel(merged_model(checkpoint, dtype), checkpoint / "tokenizer", length, f"{checkpoint} (step {manifest.step})")


def export(path: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load; returns the checkpoint that was exported.

    Raises :class:`CheckpointError` for what is no checkpoint and FileExistsError for a folder that is not empty. The
    folder appears whole.
    """
    with new_folder(out) as work:
        checkpoint = find_checkpoint(path)
        model = merged_model(checkpoint, dtype)
        model.config.use_cache = True
        model.save_pretrained(work)
        for source in sorted((checkpoint / "tokenizer").iterdir()):
            shutil.copy2(source, work / source.name)
    return checkpoint
