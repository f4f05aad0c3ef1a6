"""What the tests of memory and arithmetic share."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.load import validate
from relora_mora.config.schema import Config
from relora_mora.model.causal import LossModel, build_model
from relora_mora.optim.groups import set_trainable


def make_config(method: dict[str, Any], model: dict[str, Any] | None = None, micro_batch_size: int = 4) -> Config:
    tree = {
        "model": {"config": "x", **(model or {})},
        "tokenizer": {"path": "x"},
        "data": {"train": "x", "validation": "x", "sequence_length": 64},
        "method": {"rank": 16, **method},
        "train": {"run_dir": "x", "batch_size": micro_batch_size, "micro_batch_size": micro_batch_size},
    }
    return validate(tree, "the test")


def real_model(
    model_config: PreTrainedConfig, config: Config, *, bf16: bool = False, operator: int | None = None
) -> tuple[LossModel, Tensor]:
    """The model that trains, with values, and token ids for a micro-batch."""
    lm = build_model(model_config, seed=0, attention=config.model.attention)
    if config.method.uses_adapters:
        inject(lm, config.method, seed=0, mora_type=operator)
    set_trainable(lm, config.method)
    model = LossModel(lm.to(torch.bfloat16 if bf16 else torch.float32)).train()
    if config.model.activation_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _, layer in adapter_layers(lm):
        layer.keep_merged()
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    return model, torch.randint(0, model_config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
