"""The keys that a config.json of a family of models may have, and their effect here.

Transformers knows the keys of each family and checks their types. A value is either honored or refused: values that
would be ignored or do harm are refused.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FUNCTION = "function"  # changes what the model computes; compared at a warm start and at a resume
TRAINING = "training"  # changes how it is trained; compared at a resume
ALIAS = "alias"  # another name of one of those
EXPORT = "export"  # no effect in training; an export keeps it, but takes bos, eos and pad from the tokenizer
NOTHING = "nothing"  # describes the file itself, or how transformers calls a model; left out


class Only(NamedTuple):
    """A key that may only have this value or null; it is left out. ``remedy`` is for all other values."""

    value: Any
    remedy: str


LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")
ORIGINAL = "original_max_position_embeddings"
_TOKENS = ("unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "pad_token_id", "bos_token_id")
_ABOUT_ITSELF = (  # what a config says about its file, and keys of transformers 4
    *("name_or_path", "_commit_hash", "transformers.js_config", "unsloth_version", "unsloth_fixed", "is_llama_config"),
    *("torch_dtype", "tokenizer_class", "prefix", "finetuning_task", "task_specific_params", "num_labels"),
    *("pruned_heads", "cross_attention_hidden_size", "tie_encoder_decoder", "torchscript", "use_bfloat16"),
    *("tf_legacy_loss", "is_decoder", "use_cache", "return_dict", "transformers_version", "model_type"),
)
_REFUSED: dict[str, Only] = {
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), Only(None, "set model.attention")),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), Only(False, "leave it out")),
    "quantization_config": Only(None, "quantized weights cannot be trained here; use unquantized weights"),
    "auto_map": Only(None, "code in a model folder is never run"),
    "output_router_logits": Only(False, "it would add another loss"),
    "per_layer_config": Only(None, "layers cannot have configs of their own here"),
}
_ENDS_OF_TRAINING = ("dropout", "drop", "pdrop", "initializer_range", "aux_loss_coef")

# the least and the largest value of a number
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"), (1, 2**24)),
    **dict.fromkeys(("num_key_value_heads", "max_position_embeddings", ORIGINAL, "pretraining_tp"), (1, 2**24)),
    **dict.fromkeys(_TOKENS, (-1, 2**31)),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), (0.0, 0.99)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps"), (1e-12, 1.0)),
    "num_hidden_layers": (1, 4096),
    "initializer_range": (1e-6, 1.0),
    "rope_theta": (1.0, 1e30),
}


class Architecture(NamedTuple):
    """A family of models. Its classes in transformers start with ``prefix``; ``keys`` has the effect of each key."""

    prefix: str
    config_class: type[PreTrainedConfig]
    keys: Mapping[str, str | Only]


@functools.cache
def architecture_for(kind: str) -> Architecture | None:
    """The architecture of a ``model_type``; None if transformers has no causal language model of this type."""
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    config_class = CONFIG_MAPPING[kind]
    about = {*PreTrainedConfig().to_dict(), *_ABOUT_ITSELF}
    own = {*config_class().to_dict(), *config_class.attribute_map} - about
    own |= {"head_dim"} if "num_key_value_heads" in own else set()  # some layers read it although their class lacks it
    # transformers computes layer_types from two of these
    windows = {"use_sliding_window", "max_window_layers"} & own
    older = ("rope_scaling", "rope_theta", ORIGINAL) if "rope_parameters" in own else ()
    keys: dict[str, str | Only] = {
        **dict.fromkeys({*about, *GenerationConfig().to_dict()}, NOTHING),
        **{key: TRAINING if key.endswith(_ENDS_OF_TRAINING) else FUNCTION for key in (*own, "tie_word_embeddings")},
        **dict.fromkeys([*config_class.attribute_map, *older], ALIAS),
        **dict.fromkeys((*_TOKENS, "eos_token_id", "pretraining_tp", *windows), EXPORT),
        **{key: rule for key, rule in _REFUSED.items() if key in own or key != "output_router_logits"},
    }
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    return Architecture(name.removesuffix("ForCausalLM").removesuffix("LMHeadModel"), config_class, keys)


def model_types() -> list[str]:
    """Every ``model_type`` of a causal language model in the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


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
