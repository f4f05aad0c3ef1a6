"""Shapes of the linears of a decoder layer, from the model's config alone."""

from __future__ import annotations

from transformers import PreTrainedConfig


def head_width(model_config: PreTrainedConfig) -> int:
    """Features of a head of attention."""
    width: int | None = getattr(model_config, "head_dim", None)
    return width or model_config.hidden_size // model_config.num_attention_heads


def attention_widths(model_config: PreTrainedConfig) -> tuple[int, int]:
    """Features of all queries, and of all keys (the values have as many), of one token."""
    heads = model_config.num_attention_heads
    shared_heads = model_config.num_key_value_heads or heads
    return heads * head_width(model_config), shared_heads * head_width(model_config)


def linear_shapes(model_config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear of a decoder layer, by its name."""
    hidden = model_config.hidden_size
    intermediate = model_config.intermediate_size
    queries, keys = attention_widths(model_config)
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }
