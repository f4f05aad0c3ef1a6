"""Widths of a layer, from a model's config."""

from transformers import PreTrainedConfig


def head_width(model_config: PreTrainedConfig) -> int:
    """The number of features of an attention head."""
    width: int = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
    return width


def feed_forward_width(model_config: PreTrainedConfig) -> int:
    """The number of features between the two products of a feed-forward layer; of the widest one, if they differ."""
    width: int | list[int] | None = getattr(model_config, "intermediate_size", None)
    if isinstance(width, int):
        return width
    return max(width) if width else 4 * model_config.hidden_size
