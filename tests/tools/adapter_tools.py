"""Adapters without training: on a small LLaMA, and in folders."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.schema import MethodConfig
from relora_mora.optim.groups import set_trainable
from tests.tools.checkpoints import write_checkpoint
from tests.tools.runs import LLAMA

ADAPTERS_ONLY = {"train_embeddings": False, "train_norms": False, "train_head": False}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4, "lora_alpha": 6.0},
    **{f"mora{operator}": {"name": "mora", "rank": 4, "operators": [operator]} for operator in (1, 2, 3, 4)},
    "lora_pattern": {"name": "lora", "rank": 4, "rank_pattern": {"down_proj": 6, "q_proj": 2}},
    "mora2_pattern": {"name": "mora", "rank": 4, "operators": [2], "rank_pattern": {"down_proj": 6, "q_proj": 2}},
    "mora6": {"name": "mora", "rank": 4, "operators": [6], "square_multiple": 2},
}


def save_base(folder: Path, kind: str = "llama", seed: int = 7, **changes: Any) -> Path:
    """A model whose projections have several shapes, with weights that are large."""
    torch.manual_seed(seed)
    sizes = LLAMA | {"initializer_range": 0.2, "num_key_value_heads": 1, "head_dim": 12}
    config = AutoConfig.for_model(kind, **(sizes | changes))
    lm = AutoModelForCausalLM.from_config(config)
    for name, parameter in lm.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    lm.save_pretrained(folder)
    return folder


def adapted(base: Path, method: dict[str, Any]) -> PreTrainedModel:
    """The model of a run from ``base``, each of its trainable parameters moved at random."""
    lm = AutoModelForCausalLM.from_pretrained(base)
    settings = MethodConfig(**method, form="decoupled")
    inject(lm, settings, seed=0)
    set_trainable(lm, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return lm.eval()


def write_run(folder: Path, lm: PreTrainedModel, base: Path, tokenizer: str, method: dict[str, Any]) -> Path:
    """A checkpoint of that model."""
    [operator] = {getattr(getattr(layer, "operator", None), "mora_type", None) for _, layer in adapter_layers(lm)}
    return write_checkpoint(folder, lm, tokenizer, operator=operator, method=method, model={"init_from": str(base)})


def write_adapter_folder(folder: Path, settings: dict[str, Any], **factors: torch.Tensor) -> Path:
    """An adapter of one layer, ``model.q``."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
    tensors = {f"base_model.model.model.q.lora_{name}.weight": value for name, value in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@torch.no_grad()
def logits(lm: Any) -> torch.Tensor:
    return lm(input_ids=torch.arange(64).reshape(2, 32)).logits
