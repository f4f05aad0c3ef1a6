"""Compares FLOPs from shapes with torch's count while a model trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.registry import METHODS
from relora_mora.config.schema import Config
from relora_mora.model.causal import LossModel, build_model
from relora_mora.model.config import parse_model_config
from relora_mora.optim.groups import set_trainable
from relora_mora.sizing.measure import Flops, flops_per_token
from tests.sizing.tools import make_config
from tests.tools.each import each

MODEL = LlamaConfig(
    hidden_size=48,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=64,
)


def counted(model_config: LlamaConfig, config: Config, operator: int | None = None) -> float:
    """FLOPs per token that torch's counter sees in one forward and backward of the real model."""
    lm = build_model(model_config, seed=0, attention="eager")
    if config.method.uses_adapters:
        inject(lm, config.method, seed=0, mora_type=operator)
    set_trainable(lm, config.method)
    for _, layer in adapter_layers(lm):
        layer.keep_merged()
    model = LossModel(lm)
    if config.model.activation_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    ids = torch.randint(0, model_config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    return counter.get_total_flops() / ids.numel()


@each(
    "method",
    [
        *({"name": name, "form": form} for name in METHODS for form in ("merged", "resident", "decoupled", "auto")),
        {"name": "mora", "operators": [6], "square_size": 20},
        {"name": "mora", "target_modules": ["q_proj", "down_proj"]},
        {"name": "mora", "target_modules": ["q_proj", "down_proj"], "train_linears": False},
        {"name": "remora", "square_multiple": 8},
        {"name": "lora", "train_head": False},
        {"name": "full", "train_head": False},
    ],
)
def test_total_is_what_torch_counts(method: dict[str, Any]) -> None:
    config = make_config(method)
    assert flops_per_token(MODEL, config).total == pytest.approx(counted(MODEL, config), rel=0.01)


def test_cycle_averages_its_operators() -> None:
    config = make_config({"name": "remora", "operators": [1, 6], "square_size": 20, "form": "decoupled"})
    each = [counted(MODEL, config, operator) for operator in (1, 6)]
    assert each[1] > 1.05 * each[0]
    assert flops_per_token(MODEL, config).total == pytest.approx(sum(each) / 2, rel=0.01)


@each("name", ["full", "remora", "lora"])
def test_recomputed_forward_is_counted_separately(name: str) -> None:
    config = make_config({"name": name}, {"activation_checkpointing": True})
    flops = flops_per_token(MODEL, config)
    plain = flops_per_token(MODEL, make_config({"name": name}))
    assert flops.total == plain.total
    # torch stops the recomputation at the last tensor that backward needs, so a layer's last products may be missing
    assert 0.9 * flops.performed < counted(MODEL, config) <= 1.001 * flops.performed


def test_by_hand() -> None:
    flops = flops_per_token(MODEL, make_config({"name": "full"}))
    decoder = 2 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 112)
    assert flops == Flops(total=6.0 * decoder + 12.0 * 64 * 48 * 2 + 6.0 * 48 * 160, recomputed=0.0)


def test_an_expert_computes_the_tokens_that_it_gets() -> None:
    """Each token passes two of four experts."""
    sizes = {**MODEL.to_dict(), "model_type": "mixtral", "num_local_experts": 4, "pad_token_id": None}
    flops = flops_per_token(parse_model_config(sizes, "the test"), make_config({"name": "full"}))
    decoder = 2 * (48 * 48 * 2 + 48 * 24 * 2 + 2 * 3 * 48 * 112 + 48 * 4)
    assert flops.total == 6.0 * decoder + 12.0 * 64 * 48 * 2 + 6.0 * 48 * 160
