"""A checkpoint becomes a plain LLaMA on disk, or an adapter alone, in which nothing of this project is left."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from relora_mora.adapters import write_adapter
from relora_mora.checkpoint import CheckpointReader, tokenizer_of
from relora_mora.checkpoint.find import find_checkpoint
from relora_mora.generation import generation_config, ids_of_roles
from relora_mora.model import stored_model_config
from relora_mora.pretrained import merged_model
from relora_mora.system.new_folder import new_folder
from relora_mora.tokenizer import load_tokenizer, save_tokenizer

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
