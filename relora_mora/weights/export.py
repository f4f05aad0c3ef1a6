"""A checkpoint becomes a plain LLaMA on disk, or an adapter without its base. Nothing of this project is left in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from relora_mora.adapters.layers import AdapterLinear, adapter_layers, adapter_parameters
from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.checkpoint.reader import CheckpointReader, find_checkpoint
from relora_mora.checkpoint.tokenizer import tokenizer_of
from relora_mora.config.load import stored_config
from relora_mora.config.schema import MethodConfig, ModelConfig
from relora_mora.model.config import stored_model_config
from relora_mora.system.files import new_folder
from relora_mora.system.logs import counted, log
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.tokenizer.save import save_tokenizer
from relora_mora.weights.digests import ABSENT, other_weights
from relora_mora.weights.foreign import in_short
from relora_mora.weights.generation_config import generation_config, ids_of_roles
from relora_mora.weights.merged import checked_model, merged_model
from relora_mora.weights.peft import CONFIG, KEY, PREFIX, RELEASED_TYPES, WEIGHTS, note_of

_MERGED = "export it with --format=merged"


def write_adapter(reader: CheckpointReader, out: Path, dtype: torch.dtype, *, released: bool) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` of a checkpoint into a folder that exists.

    LoRA as it is. MoRA as the LoRA with the same delta, of rank R (operator 6: R for each block of inputs), or with
    ``released`` as the released MoRA writes it. What trained beside the adapters goes in as whole modules.

    Raises :class:`CheckpointError` where there is no adapter, or where it is not all that makes the run's model of the
    model in ``model.init_from``.
    """
    lm = checked_model(reader)
    config = stored_config(reader.manifest.config, str(reader.folder))
    layers = dict(adapter_layers(lm))
    _check(reader, config.model, config.method, released=released)
    modules = _whole_modules(reader, layers, adapter_parameters(lm))
    tensors = {
        f"{PREFIX}{name}": reader.weight(name)
        for name in [*reader.manifest.parameters, *reader.manifest.frozen]
        if name.rpartition(".")[0] in modules
    }
    ranks: dict[str, float] = {}  # by kind of projection, as the layers of a kind have one shape
    for name, layer in layers.items():
        factors = _factors(layer, [reader.weight(f"{name}.{key}") for key in layer.adapter_names], released=released)
        if factors is None:
            raise CheckpointError(f"{reader.folder}: {config.method.name} has no adapter that PEFT knows; {_MERGED}")
        A, B = factors
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
        # the released code takes the square root of (in + out) r for R
        rank = len(A) ** 2 / (layer.in_features + layer.out_features) if released else len(A)
        ranks[name.rpartition(".")[2]] = rank
    cast = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    broken = [name for name, value in cast.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{reader.folder}: values too large for {dtype} in {in_short(broken)}; choose another type"
        )
    first = f"{next(iter(layers))}.weight"
    save_file(cast, out / WEIGHTS, metadata={"format": "pt", KEY: note_of(first, reader.weight(first))})
    settings = _settings(config.method, ranks, released=released) | {
        "base_model_name_or_path": config.model.init_from,
        "modules_to_save": sorted({_kind(module) for module in modules}) or None,
    }
    if released:
        settings |= {"use_mora": True, "mora_type": reader.manifest.operator}
    (out / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _check(reader: CheckpointReader, model: ModelConfig, method: MethodConfig, *, released: bool) -> None:
    manifest = reader.manifest
    began = other_weights(reader.folder, model).get("model.init_from")
    fault = None
    if not method.uses_adapters:
        fault = f"{method.name} trains without adapters"
    elif model.init_from is None:
        fault = "its settings have no model.init_from, so nobody has the model that its adapter would go to"
    elif began == ABSENT["model.init_from"]:
        fault = f"it began with {began}, so nobody has the model that its adapter would go to"
    elif manifest.merges_done:
        fault = f"{counted(manifest.merges_done, 'merge')} changed the weights that its adapter goes to"
    elif "model.embed_tokens.weight" in manifest.parameters and manifest.model_config.get("tie_word_embeddings"):
        fault = "embeddings that are also the head were trained, which PEFT does not keep with an adapter"
    elif released and manifest.operator not in RELEASED_TYPES:
        known = ", ".join(map(str, RELEASED_TYPES))
        what = method.name if manifest.operator is None else f"operator {manifest.operator}"
        fault = f"{what} is not known to the released MoRA, which has the operators {known}"
    if fault is not None:
        raise CheckpointError(f"{reader.folder}: {fault}; {_MERGED}")
    if began is not None:
        log.warning(
            "%s: %s, the base that its adapter names, holds other files than the run began with; use it with those",
            reader.folder,
            model.init_from,
        )


def _whole_modules(reader: CheckpointReader, layers: Mapping[str, AdapterLinear], adapters: set[str]) -> set[str]:
    """The modules of what trained beside the adapters."""
    trained = set(reader.manifest.parameters) - adapters
    modules = {name.rpartition(".")[0] for name in trained}
    beside = sorted(modules & set(layers))
    if beside:
        raise CheckpointError(
            f"{reader.folder}: biases of layers with adapters were trained ({in_short(beside)}), which an adapter "
            f"alone does not hold; {_MERGED}"
        )
    return modules


def _kind(module: str) -> str:
    """As ``modules_to_save`` names it: one name for the same module of all layers."""
    return module.rpartition(".")[2] if ".layers." in module else module


def _factors(layer: AdapterLinear, values: list[Tensor], *, released: bool) -> tuple[Tensor, Tensor] | None:
    if not released:
        return layer.as_lora(*values)
    [M] = values
    return M, M.clone()


def _settings(method: MethodConfig, ranks: Mapping[str, float], *, released: bool) -> dict[str, Any]:
    alpha: float = method.rank if method.lora_alpha is None or method.uses_squares else method.lora_alpha
    patterns = ranks if method.uses_squares else method.rank_pattern
    fixed = released if method.uses_squares else method.lora_alpha is not None  # one alpha for all
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": method.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": patterns,
        "alpha_pattern": {} if fixed else patterns,
        "lora_dropout": method.dropout,
        "target_modules": sorted(method.target_modules),
        "bias": "none",
    }


FORMATS = ("merged", "peft", "peft-mora")


def export(path: Path, out: Path, dtype: torch.dtype = torch.float32, form: str = "merged") -> Path:
    """Writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load; returns the checkpoint used for it.

    ``form`` is one of ``FORMATS``: the whole model, or its adapter alone (:func:`write_adapter`). Special tokens and
    their ids are the tokenizer's; ``generate`` of transformers also stops where the chat template ends an answer. No
    file of the checkpoint is copied: model and tokenizer are written anew. The folder appears whole or not at all.
    Raises :class:`CheckpointError` for what is not a checkpoint or has no adapter alone, and FileExistsError for an
    output folder that is not empty.
    """
    with new_folder(out) as work:
        checkpoint = find_checkpoint(path)
        with tokenizer_of(checkpoint) as folder:
            tokenizer = load_tokenizer(folder)
            if form == "merged":
                _write_model(checkpoint, tokenizer, work, dtype)
            else:
                reader = CheckpointReader(checkpoint)
                write_adapter(reader, work, dtype, released=form == "peft-mora")
                model_config = stored_model_config(reader.manifest.model_config)
                generation_config(tokenizer, model_config).save_pretrained(work)
            save_tokenizer(tokenizer, work)
    return checkpoint


def _write_model(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, out: Path, dtype: torch.dtype) -> None:
    model = merged_model(checkpoint, dtype)
    model.generation_config = generation_config(tokenizer, model.config)
    model.config.update({**ids_of_roles(tokenizer), "use_cache": True})
    model.save_pretrained(out)
    _name_rope(out / "config.json")


def _name_rope(path: Path) -> None:
    """Beside ``rope_parameters`` of transformers 5 writes what transformers 4, and what builds on it, has in its place.

    They would compute with a base of 10,000 and no scaling.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    parameters = config.get("rope_parameters") or {}
    if "rope_theta" in parameters:
        config["rope_theta"] = parameters["rope_theta"]
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        if scaling.get("rope_type") == "longrope":  # they look for it there alone
            config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
