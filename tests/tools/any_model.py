"""Tiny configs of many families of models."""

from typing import Any

from transformers import PreTrainedConfig

from relora_mora.model.config import LLAMA_FAMILY, family_of, parse_model_config
from tests.tools.grids import rest

# the number of kinds of linears in their layers
FAMILIES = {"gemma2": 7, "olmo2": 7, "phi3": 4, "cohere2": 7, "gpt_neox": 4, "mixtral": 4, "gpt_oss": 4, "opt": 6}
FURTHER_FAMILIES = {
    **dict.fromkeys(("gemma", "gemma3_text", "olmo", "olmo3", "smollm3", "granite", "cohere", "stablelm", "helium"), 7),
    **dict.fromkeys(LLAMA_FAMILY, 7),
    **dict.fromkeys(("phi", "gptj", "glm4", "nemotron", "starcoder2", "apertus"), 6),
    **dict.fromkeys(("qwen3_moe", "olmoe", "falcon", "bloom", "mpt"), 4),
    "llama4_text": 7,
}
KINDS = FAMILIES | FURTHER_FAMILIES
SIZES = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128},
    **{"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 128, "rotary_dim": 8},
    **{"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "ffn_dim": 96, "word_embed_proj_dim": 64},
    **{"sliding_window": 16, "attention_chunk_size": 16, "num_experts": 4, "num_local_experts": 4},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 48, "intermediate_size_mlp": 96},
    **{"state_size": 8, "mamba_d_state": 8},
}
WIDER = {"hidden_size": 128, "n_embd": 128, "head_dim": 32}


def some(*kinds: str) -> list[Any]:
    """All kinds of models; ``make test`` has these."""
    return [*kinds, *rest(*((kind,) for kind in sorted(KINDS) if kind not in kinds))]


def any_config(kind: str, *, wide: bool = False, **changes: Any) -> PreTrainedConfig:
    """A config of this ``model_type`` with two small layers and, if the family has them, short windows."""
    defaults = family_of({"model_type": kind}, kind).config_class().to_dict()
    sizes = SIZES | (WIDER if wide else {})
    follow = [key for key, value in defaults.items() if value is None and key != "num_key_value_heads"]
    own = {key: value for key, value in sizes.items() if key in defaults and key not in follow}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return parse_model_config({"model_type": kind, **own, **tokens, **changes}, kind)
