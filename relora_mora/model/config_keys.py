"""Every key that a config.json may have, its effect here, and in the LLaMA family the range of its numbers.

``KEYS`` is for a LLaMA, ``ARCHITECTURES`` has the keys of its family, and :func:`architecture_for` asks transformers
for those of any other causal language model. Transformers checks types. A value is either honored or refused: values
that would be ignored or do harm are refused.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import transformers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FUNCTION = "function"  # changes what the model computes; compared at a warm start and at a resume
TRAINING = "training"  # changes how it is trained; compared at a resume
ALIAS = "alias"  # an older name of one of those
EXPORT = "export"  # no effect in training; an export keeps it, but takes bos, eos and pad from the tokenizer
NOTHING = "nothing"  # describes the file itself, or how transformers calls a model; left out


class Only(NamedTuple):
    """A key that may only have this value or null; it is left out. ``remedy`` is for all other values."""

    value: Any
    remedy: str


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
_TOKENS = ("unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "pad_token_id", "bos_token_id")
ORIGINAL = "original_max_position_embeddings"
_SEES_ALL = "attention here sees every position before it"
_NO_BIAS = Only(False, "linears have no biases in this kind of model")

KEYS: dict[str, str | Only] = {
    # what a config says about itself, temperature and the like in old exports, and keys of transformers 4
    **dict.fromkeys({**PreTrainedConfig().to_dict(), **GenerationConfig().to_dict()}, NOTHING),
    **dict.fromkeys(
        (
            *("name_or_path", "_commit_hash", "transformers.js_config", "unsloth_version", "unsloth_fixed"),
            *("is_llama_config", "torch_dtype", "tokenizer_class", "prefix", "finetuning_task", "task_specific_params"),
            *("num_labels", "pruned_heads", "cross_attention_hidden_size", "tie_encoder_decoder", "torchscript"),
            *("use_bfloat16", "tf_legacy_loss", "is_decoder"),
        ),
        NOTHING,
    ),
    **dict.fromkeys(("model_type", *_SIZES, "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias"), FUNCTION),
    **dict.fromkeys(("tie_word_embeddings", "rope_parameters"), FUNCTION),
    **dict.fromkeys(("attention_dropout", "initializer_range"), TRAINING),
    # max_position_embeddings in the first configs of LLaMA; written by transformers 4; written here by Phi-3
    **dict.fromkeys(("max_sequence_length", "rope_scaling", "rope_theta", ORIGINAL), ALIAS),
    **dict.fromkeys((*_TOKENS, "eos_token_id", "pretraining_tp"), EXPORT),
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), Only(None, "set model.attention")),
    **dict.fromkeys(("layer_types", "per_layer_config"), Only(None, "all layers are alike here")),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), Only(False, "leave it out")),
    "quantization_config": Only(None, "quantized weights cannot be trained here; use unquantized weights"),
    "auto_map": Only(None, "code in a model folder is never run"),
    "sliding_window": Only(None, _SEES_ALL),
    "use_sliding_window": Only(False, _SEES_ALL),
    "partial_rotary_factor": Only(1.0, "rotary embeddings rotate whole heads here"),
    "rope_interleaved": Only(False, "rotary embeddings pair halves of a head here"),
}

# the keys of each rope type in addition to rope_theta
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": (
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        ORIGINAL,
    ),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", ORIGINAL),
}

# the least and the largest value
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys((*_SIZES, "max_sequence_length", ORIGINAL, "pretraining_tp", "sliding_window"), (1, 2**24)),
    **dict.fromkeys(_TOKENS, (-1, 2**31)),
    "num_hidden_layers": (1, 4096),
    "rms_norm_eps": (1e-12, 1.0),
    "attention_dropout": (0.0, 0.99),
    "initializer_range": (1e-6, 1.0),
    "rope_theta": (1.0, 1e30),
    **{key: (1e-6, 1e6) for keys in ROPE_KEYS.values() for key in keys if key not in (ORIGINAL, "truncate")},
    "factor": (1.0, 1e6),
}


class Architecture(NamedTuple):
    """A kind of model. Its classes in transformers start with ``prefix``, and ``keys`` are those of its config.

    ``known``: it belongs to the LLaMA family, whose values are checked one by one. Of other models, transformers says
    whether it can build them.
    """

    prefix: str
    keys: Mapping[str, str | Only]
    config_class: type[PreTrainedConfig]
    known: bool = True


# transformers computes layer_types from use_sliding_window and max_window_layers
_WINDOWS = {
    **dict.fromkeys(("sliding_window", "layer_types"), FUNCTION),
    **dict.fromkeys(("use_sliding_window", "max_window_layers"), EXPORT),
}
_OWN_BIAS = Only(None, "in a Qwen2 q, k and v have biases, and other linears do not")
# by the model_type of a config.json
ARCHITECTURES = {
    "llama": Architecture("Llama", KEYS, transformers.LlamaConfig),
    "mistral": Architecture(
        "Mistral",
        {**KEYS, "attention_bias": _NO_BIAS, "mlp_bias": _NO_BIAS, "sliding_window": FUNCTION},
        transformers.MistralConfig,
    ),
    "qwen2": Architecture(
        "Qwen2", {**KEYS, "attention_bias": _OWN_BIAS, "mlp_bias": _NO_BIAS, **_WINDOWS}, transformers.Qwen2Config
    ),
    "qwen3": Architecture("Qwen3", {**KEYS, "mlp_bias": _NO_BIAS, **_WINDOWS}, transformers.Qwen3Config),
}
_REFUSED = ("quantization_config", "auto_map", "attn_implementation", "_attn_implementation", "is_encoder_decoder")
_IN_ANY = {key: rule for key, rule in KEYS.items() if rule == NOTHING or key in _REFUSED}


@functools.cache
def architecture_for(kind: str) -> Architecture | None:
    """The architecture of a ``model_type``; None if transformers has no causal language model of this type."""
    if kind in ARCHITECTURES or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return ARCHITECTURES.get(kind)
    config_class = CONFIG_MAPPING[kind]
    own = {*config_class().to_dict(), *config_class.attribute_map} - {*PreTrainedConfig().to_dict(), *_TOKENS}
    trains = ("dropout", "drop", "pdrop", "initializer_range", "aux_loss_coef")
    keys: dict[str, str | Only] = {
        **_IN_ANY,
        **{key: TRAINING if key.endswith(trains) else FUNCTION for key in own},
        **dict.fromkeys(("tie_word_embeddings",), FUNCTION),
        **dict.fromkeys(config_class.attribute_map, ALIAS),
        **dict.fromkeys(("rope_scaling", "rope_theta") if "rope_parameters" in own else (), ALIAS),
        **dict.fromkeys((*_TOKENS, "eos_token_id"), EXPORT),
        **{key: KEYS[key] for key in _REFUSED},
        **dict.fromkeys({"output_router_logits"} & own, Only(False, "it would add another loss")),
        **dict.fromkeys({"use_cache", "return_dict", "transformers_version", "model_type"}, NOTHING),
    }
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    prefix = name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return Architecture(prefix, keys, config_class, known=False)


def model_types() -> list[str]:
    """Every ``model_type`` of a causal language model in the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
