"""Configs of the LLaMA family: every key that a config.json may have, its allowed values, and its effect here.

``KEYS`` is the complete rule for a LLaMA, and ``ARCHITECTURES`` has one for each kind of model. A value is either
honored or refused: values that would be ignored or do harm are refused.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import transformers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

FUNCTION = "function"  # changes what the model computes; compared at a warm start and at a resume
TRAINING = "training"  # changes how it is trained; compared at a resume
ALIAS = "alias"  # an older name of one of those
EXPORT = "export"  # no effect in training; an export keeps it, but takes bos, eos and pad from the tokenizer
NOTHING = "nothing"  # describes the file itself, or how transformers calls a model; left out
ONLY = "only"  # only one value is allowed

LARGEST_SIZE = 2**24


class Key(NamedTuple):
    """``use`` is one of the six above. ``accepts`` checks a value, and ``expected`` describes the accepted values."""

    use: str
    expected: str = ""
    accepts: Callable[[Any], bool] = lambda value: True


def _is_number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_whole(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int) and _is_number(value, least, most)


def _whole(use: str, most: int = LARGEST_SIZE) -> Key:
    return Key(use, f"a whole number from 1 to {most}", lambda value: _is_whole(value, 1, most))


def _number(use: str, least: float, most: float) -> Key:
    return Key(use, f"a number from {least:g} to {most:g}", lambda value: _is_number(value, least, most))


def _flag(use: str) -> Key:
    return Key(use, "true or false", lambda value: isinstance(value, bool))


def _mapping(use: str) -> Key:
    return Key(use, "a mapping or null", lambda value: value is None or isinstance(value, dict))


def _token(use: str) -> Key:
    return Key(use, "a token id or null", lambda value: value is None or _is_whole(value, -1, math.inf))


def _or_null(key: Key) -> Key:
    return key._replace(expected=f"{key.expected}, or null", accepts=lambda value: value is None or key.accepts(value))


def _only(*values: Any, remedy: str = "leave it out") -> Key:
    """Accepts the values and null, which leaves the key out."""
    return Key(
        ONLY,
        f"{json.dumps(values[0])}: {remedy}",
        lambda value: value is None or any(value == one and type(value) is type(one) for one in values),
    )


def _is_activation(value: Any) -> bool:
    """Whether it is an activation of transformers without parameters."""
    return isinstance(value, str) and value in ACT2FN and not ACT2FN[value].state_dict()


def _classes(prefix: str) -> Key:
    return Key(
        NOTHING,
        f"names of classes such as {prefix}ForCausalLM",
        lambda value: all(
            str(name).lower().startswith(prefix.lower()) for name in (value if isinstance(value, list) else [])
        ),
    )


def _list_of(use: str, items: str, accepts: Callable[[Any], bool]) -> Key:
    return Key(use, f"a list of {items}", lambda value: isinstance(value, list) and all(map(accepts, value)))


KEYS: dict[str, Key] = {
    **dict.fromkeys(GenerationConfig().to_dict(), Key(NOTHING)),  # temperature and the like, in old exports
    "vocab_size": _whole(FUNCTION),
    "hidden_size": _whole(FUNCTION),
    "intermediate_size": _whole(FUNCTION),
    "num_hidden_layers": _whole(FUNCTION, 4096),
    "num_attention_heads": _whole(FUNCTION),
    "num_key_value_heads": _or_null(_whole(FUNCTION)),
    "head_dim": _or_null(_whole(FUNCTION)),
    "max_position_embeddings": _whole(FUNCTION),
    "max_sequence_length": _or_null(_whole(ALIAS)),  # max_position_embeddings in the first configs of LLaMA
    "hidden_act": Key(FUNCTION, "an activation of transformers without parameters, such as silu", _is_activation),
    "rms_norm_eps": _number(FUNCTION, 1e-12, 1),
    "attention_bias": _flag(FUNCTION),
    "mlp_bias": _flag(FUNCTION),
    "tie_word_embeddings": _flag(FUNCTION),
    "rope_parameters": _mapping(FUNCTION),
    "rope_scaling": _mapping(ALIAS),  # transformers 4 wrote this and rope_theta
    "rope_theta": _or_null(_number(ALIAS, 1, 1e30)),
    "original_max_position_embeddings": _or_null(_whole(ALIAS)),  # for some rope types, written here by Phi-3
    "attention_dropout": _number(TRAINING, 0, 0.99),
    "initializer_range": _number(TRAINING, 1e-6, 1),
    "pad_token_id": _token(EXPORT),  # text is packed and never padded, so its embedding is not frozen
    "bos_token_id": _token(EXPORT),
    "eos_token_id": Key(
        EXPORT,
        "a token id, a list of them, or null",
        lambda value: all(map(_token(EXPORT).accepts, value if isinstance(value, list) else [value])),
    ),
    **dict.fromkeys(("unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id"), _token(EXPORT)),
    "pretraining_tp": _or_null(_whole(EXPORT)),
    **dict.fromkeys(
        (
            *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "transformers.js_config"),
            *("unsloth_version", "unsloth_fixed", "is_llama_config", "dtype", "torch_dtype", "use_cache", "is_decoder"),
            *("tokenizer_class", "prefix", "finetuning_task", "task_specific_params"),
            *("problem_type", "num_labels", "id2label", "label2id", "return_dict", "output_hidden_states"),
            *("output_attentions", "chunk_size_feed_forward", "pruned_heads", "cross_attention_hidden_size"),
            *("tie_encoder_decoder", "torchscript", "use_bfloat16", "tf_legacy_loss"),
        ),
        Key(NOTHING),
    ),
    "architectures": _classes("Llama"),
    "model_type": Key(FUNCTION),  # one of ARCHITECTURES
    "attn_implementation": _only(None, remedy="set model.attention"),
    "_attn_implementation": _only(None, remedy="set model.attention"),
    "quantization_config": _only(None, remedy="quantized weights cannot be trained here; use unquantized weights"),
    "auto_map": _only(None, remedy="code in a model folder is never run"),
    "sliding_window": _only(None, remedy="attention here sees every position before it"),
    "use_sliding_window": _only(False, remedy="attention here sees every position before it"),
    "layer_types": _only(None, remedy="all layers are alike here"),
    "per_layer_config": _only(None, remedy="all layers are alike here"),
    "partial_rotary_factor": _only(1.0, 1, remedy="rotary embeddings rotate whole heads here"),
    "rope_interleaved": _only(False, remedy="rotary embeddings pair halves of a head here"),
    "is_encoder_decoder": _only(False),
    "add_cross_attention": _only(False),
}

# the required keys of each rope type in addition to rope_theta, and its optional keys
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
    ),
    "longrope": (("short_factor", "long_factor"), ("original_max_position_embeddings", "attention_factor", "factor")),
}
_POSITIVE = _number(FUNCTION, 1e-6, 1e6)
_FACTORS = _list_of(FUNCTION, "positive numbers", _POSITIVE.accepts)
ROPE_VALUES: dict[str, Key] = {
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "attention_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "mscale": _POSITIVE,
    "mscale_all_dim": _POSITIVE,
    "factor": _number(FUNCTION, 1, 1e6),
    "rope_theta": KEYS["rope_theta"],
    "partial_rotary_factor": KEYS["partial_rotary_factor"],
    "original_max_position_embeddings": KEYS["max_position_embeddings"],
    "truncate": _flag(FUNCTION),
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
}


class Architecture(NamedTuple):
    """A kind of model. Its classes in transformers start with ``prefix``, and ``keys`` is the rule for its config.

    Its modules have the same names as in a LLaMA, and its decoder layers are called with the same arguments.
    """

    prefix: str
    keys: Mapping[str, Key]

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return getattr(transformers, f"{self.prefix}Config")

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, f"{self.prefix}ForCausalLM")


def _like_llama(prefix: str, **keys: Key) -> Architecture:
    return Architecture(prefix, KEYS | {"architectures": _classes(prefix)} | keys)


_NO_BIAS = _only(False, remedy="linears have no biases in this kind of model")
# a window that is shorter than the sequence is refused, so a window has no effect in training
_WINDOW = _or_null(_whole(EXPORT))
_LAYER_TYPES = ("full_attention", "sliding_attention")
_WINDOWS = {
    "sliding_window": _WINDOW,
    "use_sliding_window": _flag(EXPORT),
    "max_window_layers": Key(EXPORT, "a whole number", lambda value: _is_whole(value, 0, LARGEST_SIZE)),
    "layer_types": _or_null(_list_of(EXPORT, " and ".join(_LAYER_TYPES), lambda kind: kind in _LAYER_TYPES)),
}
# by the model_type of a config.json
ARCHITECTURES = {
    "llama": Architecture("Llama", KEYS),
    "mistral": _like_llama("Mistral", attention_bias=_NO_BIAS, mlp_bias=_NO_BIAS, sliding_window=_WINDOW),
    "qwen2": _like_llama(
        "Qwen2",
        attention_bias=_only(None, remedy="in a Qwen2 q, k and v have biases, and other linears do not"),
        mlp_bias=_NO_BIAS,
        **_WINDOWS,
    ),
    "qwen3": _like_llama("Qwen3", mlp_bias=_NO_BIAS, head_dim=_whole(FUNCTION), **_WINDOWS),
}
