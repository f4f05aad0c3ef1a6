"""Compares FLOPs from shapes with torch's count while a model trains."""

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from relora_mora.config.registry import METHODS
from relora_mora.config.schema import Config
from relora_mora.model.config import parse_model_config
from relora_mora.sizing.measure import flops_per_token, measure
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import meta_model
from tests.sizing.tools import make_config, real_model
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
DECODER = 2 * (48 * 48 * 2 + 48 * 24 * 2)  # the projections of attention
ATTENTION_AND_HEAD = 12.0 * 64 * 48 * 2 + 6.0 * 48 * 160


def counted(config: Config, operator: int | None = None) -> float:
    """FLOPs per token that torch's counter sees in one forward and backward of the real model."""
    eager = config.model_copy(update={"model": config.model.model_copy(update={"attention": "eager"})})
    model, ids = real_model(MODEL, eager, operator=operator)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    return counter.get_total_flops() / ids.numel()


@each(
    "method",
    [
        *({"name": name, "form": form} for name in METHODS for form in ("merged", "resident", "decoupled", "auto")),
        {"name": "mora", "operators": [6], "square_size": 20},
        {"name": "mora", "target_modules": ["q_proj", "down_proj"], "train_linears": False},
        {"name": "full", "train_head": False},
    ],
)
def test_total_is_what_torch_counts(method: dict[str, Any]) -> None:
    config = make_config(method)
    assert flops_per_token(MODEL, config) == pytest.approx(counted(config), rel=0.01)


def test_cycle_averages_its_operators() -> None:
    config = make_config({"name": "remora", "operators": [1, 6], "square_size": 20, "form": "decoupled"})
    one, six = (counted(config, operator) for operator in (1, 6))
    assert six > 1.05 * one
    assert flops_per_token(MODEL, config) == pytest.approx((one + six) / 2, rel=0.01)


@each("name", ["full", "remora"])
def test_recomputed_forward_is_counted_separately(name: str) -> None:
    config = make_config({"name": name}, {"activation_checkpointing": True})
    planned = measure(meta_model(MODEL, config.method), Setup(config, 0, 1, bf16=False))
    assert planned.flops == flops_per_token(MODEL, make_config({"name": name}))
    # torch stops the recomputation at the last tensor that backward needs, so a layer's last products may be missing
    performed = planned.flops + planned.recomputed
    assert 0.9 * performed < counted(config) <= 1.001 * performed


def test_by_hand() -> None:
    """In a mixture of experts, each token passes two of four experts."""
    config = make_config({"name": "full"})
    assert flops_per_token(MODEL, config) == 6.0 * (DECODER + 2 * 3 * 48 * 112) + ATTENTION_AND_HEAD
    sizes = {**MODEL.to_dict(), "model_type": "mixtral", "num_local_experts": 4, "pad_token_id": None}
    experts = 6.0 * (DECODER + 2 * (2 * 3 * 48 * 112 + 48 * 4)) + ATTENTION_AND_HEAD
    assert flops_per_token(parse_model_config(sizes, "the test"), config) == experts
