"""Reads, checks and compares configs of models.

Transformers knows the keys of each family, and checks types. What it would accept although the model would be another
one, or fail later, is refused here.
"""

import copy
import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from relora_mora.adapters.inject import decoder_layers
from relora_mora.config.load import ConfigError, read_json
from relora_mora.config.schema import ModelConfig
from relora_mora.model.causal import empty_model
from relora_mora.model.documents import head_width

LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")
ORIGINAL = "original_max_position_embeddings"
_KEPT = {  # no effect in training; an export keeps them
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
    "pretraining_tp",
}
_WINDOWS = {"use_sliding_window", "max_window_layers"}  # transformers computes layer_types from them
_ABOUT_ITSELF = {  # what a config says about its file, and keys of transformers 4
    *("name_or_path", "_commit_hash", "transformers.js_config", "unsloth_version", "unsloth_fixed", "is_llama_config"),
    *("torch_dtype", "tokenizer_class", "prefix", "finetuning_task", "task_specific_params", "num_labels"),
    *("pruned_heads", "cross_attention_hidden_size", "tie_encoder_decoder", "torchscript", "use_bfloat16"),
    *("tf_legacy_loss", "is_decoder", "use_cache", "return_dict", "transformers_version", "model_type"),
}
_REFUSED = {
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), "set model.attention"),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), "leave it out"),
    "quantization_config": "quantized weights cannot be trained here; use unquantized weights",
    "auto_map": "code in a model folder is never run",
    "output_router_logits": "it would add another loss",
    "per_layer_config": "layers cannot have configs of their own here",
}
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"), (1, 2**24)),
    **dict.fromkeys(("num_key_value_heads", "max_position_embeddings", ORIGINAL), (1, 2**24)),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), (0.0, 0.99)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps"), (1e-12, 1.0)),
    "num_hidden_layers": (1, 4096),
    "initializer_range": (1e-6, 1.0),
    "rope_theta": (1.0, 1e30),
}
_OF_TRAINING = ("dropout", "drop", "pdrop", "initializer_range", "aux_loss_coef")  # ends of keys
_STRETCHED = ("dynamic", "yarn", "longrope")  # rope types that may depend on max_position_embeddings


class Family(NamedTuple):
    """The config class of a ``model_type``, and keys of a config.json: those that decide what the model computes or how
    it trains, those that the class is given, and all that a file may have."""

    config_class: type[PreTrainedConfig]
    compared: frozenset[str]
    used: frozenset[str]
    known: frozenset[str]


@functools.cache
def _family(kind: str) -> Family:
    config_class = CONFIG_MAPPING[kind]
    about = {*PreTrainedConfig().to_dict(), *_ABOUT_ITSELF}
    own = {*config_class().to_dict()} - about | {"tie_word_embeddings"}
    own |= {"head_dim"} if "num_key_value_heads" in own else set()  # some layers read it although their class lacks it
    kept = _KEPT | (_WINDOWS & own)
    older = ("rope_scaling", "rope_theta", ORIGINAL) if "rope_parameters" in own else ()
    aliases = {*config_class.attribute_map, *older}
    used = (own | aliases | kept) - {*_REFUSED, "model_type"}
    known = used | about | {*GenerationConfig().to_dict(), *(_REFUSED.keys() - {"output_router_logits"} | own)}
    return Family(config_class, *map(frozenset, (used - aliases - kept, used, known)))


def family_of(values: Mapping[str, Any], source: str) -> Family:
    """The family of a config's ``model_type``, by default LLaMA.

    Raises :class:`ConfigError` if transformers has no causal language model of this type.
    """
    kind = values.get("model_type") or "llama"
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = get_close_matches(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        known = f"did you mean {' or '.join(near)}?" if near else "such as llama, qwen3 or gemma2"
        fault = f"model: model_type is {_shown(kind)}, expected a causal language model of transformers; {known}"
        raise ConfigError([fault], source)
    return _family(kind)


def read_model_config(settings: ModelConfig) -> PreTrainedConfig:
    """The config in the JSON file ``model.config``, with the overrides applied.

    Raises :class:`ConfigError` with every fault: a file that cannot be read or is not JSON, unknown keys, and values
    that are invalid or do not fit together.
    """
    assert settings.config is not None
    path = Path(settings.config)
    return parse_model_config(
        read_json(path, "model.config") | settings.overrides,
        f"{path} with model.overrides" if settings.overrides else str(path),
    )


def parse_model_config(values: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """Builds a config from these keys, without those that do nothing; raises :class:`ConfigError` with every fault.

    A key that the family does not have is ignored if its value is null or false, so that an override can remove a key
    of the file. The model is built without its weights, since transformers finds most faults there.
    """
    family = family_of(values, source)
    used = copy.deepcopy({key: value for key, value in values.items() if key in family.used})
    wrong = [*_value_faults(family.config_class, used), *_rope_faults(used, family.config_class)]
    faults = [*_key_faults(family, values), *wrong]
    if not wrong:
        try:
            model_config = family.config_class(**used)
            faults += _model_faults(model_config)
        except Exception as error:  # transformers raises nearly any kind
            rope = f" with rope_parameters {_shown(used['rope_parameters'])}" if "rope_parameters" in used else ""
            faults.append(f"{_shown(error)}, in a {family.config_class.__name__}{rope}; correct it")
    if faults:
        raise ConfigError([f"model: {fault}" for fault in faults], source)
    model_config.use_cache = False
    return model_config


def stored_model_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config in a checkpoint's manifest, without foreign keys and names of code.

    Raises whatever transformers raises if it cannot build the config.
    """
    family = family_of(values, "the manifest")
    return family.config_class(**{key: value for key, value in values.items() if key in family.used})


def _rope_faults(values: dict[str, Any], config_class: type[PreTrainedConfig]) -> list[str]:
    """Faults of parameters of rotary embeddings that have two names and are not the same; transformers takes either.

    Moves a number of positions that stands next to them, where transformers ignores it, to them.
    """
    found, scaling = (
        values[key] if isinstance(values.get(key), dict) else {} for key in ("rope_parameters", "rope_scaling")
    )
    older = {("rope_type" if key == "type" else key): value for key, value in scaling.items()}
    older |= {key: values[key] for key in ("rope_theta", ORIGINAL) if values.get(key) is not None}
    if ORIGINAL not in {field.name for field in fields(config_class)}:
        original = values.pop(ORIGINAL, None)
        for rope in (found, scaling):
            if original is not None and rope.get("rope_type", rope.get("type")) in ("yarn", "longrope", "llama3"):
                rope.setdefault(ORIGINAL, original)
    return [
        f"{key} is {_shown(found[key])} and, by an older name, {_shown(value)}; keep one of them"
        for key, value in older.items()
        if found.get(key, value) != value
    ]


def _value_faults(config_class: type[PreTrainedConfig], values: Mapping[str, Any]) -> Iterator[str]:
    """Yields faults of single values: of their types, which transformers knows, and of numbers out of range."""
    probe = config_class()
    kinds = {field.name: field.type for field in fields(config_class)}
    for key, value in values.items():
        try:
            if key in kinds:
                setattr(probe, key, value)
        except StrictDataclassFieldValidationError:
            yield f"{key} is {_shown(value)}, expected {getattr(kinds[key], '__name__', kinds[key])}"
            continue
        if key == "rope_parameters" and isinstance(value, dict):
            yield from _range_faults("rope_theta", value.get("rope_theta"))
        yield from _range_faults(key, value)
        if key == "hidden_act" and value not in ACT2FN:
            yield f"{key} is {_shown(value)}, expected an activation of transformers, such as silu"


def _range_faults(key: str, value: Any) -> Iterator[str]:
    if key not in _RANGES or value is None:
        return
    least, most = _RANGES[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        yield f"{key} is {_shown(value)}, expected a number from {least} to {most}"


def _key_faults(family: Family, values: Mapping[str, Any]) -> Iterator[str]:
    """Yields faults of unknown keys and of those that this package does not honor."""
    for key, value in values.items():
        if value is None or value is False:
            continue
        if key not in family.known:
            near = get_close_matches(key, family.used, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            name = family.config_class.__name__
            yield f"{key} is not a key of a {name}{meant}; set it to null in model.overrides to leave it out"
        elif key in _REFUSED:
            yield f"{key} is {_shown(value)}: {_REFUSED[key]}"


def _model_faults(model_config: PreTrainedConfig) -> Iterator[str]:
    """Yields faults of sizes that do not fit together, and of the model, which this builds without its weights."""
    kind = model_config.model_type
    if model_config.get_text_config() is not model_config:
        yield f"a {kind} is more than a language model; use the type of its text part"
        return
    heads = getattr(model_config, "num_attention_heads", None)
    shared = getattr(model_config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        yield f"num_key_value_heads is {shared}, expected a divisor of num_attention_heads {heads}"
    if getattr(model_config, "rope_parameters", None) and head_width(model_config) % 2:
        yield f"head_dim is {head_width(model_config)}, expected an even number, since rotary embeddings rotate pairs"
    lm = empty_model(model_config)
    if not decoder_layers(lm) or not isinstance(lm.get_output_embeddings(), nn.Linear):
        yield f"a {kind} has no layers that can be checkpointed, or no output head; use another type"


def _shown(value: Any) -> str:
    text = " ".join(str(value).split()) if isinstance(value, Exception) else repr(value)
    text = re.sub(r"^Class validation error for validator '\w+': \w+: ", "", text)  # by huggingface_hub
    return text if len(text) < 160 else text[:157] + "..."


def compared_keys(model_config: PreTrainedConfig, *, training: bool = False) -> dict[str, Any]:
    """The keys that decide what a model computes, with ``training`` also how it trains, so that two can be compared."""
    names = family_of({"model_type": model_config.model_type}, "the model").compared
    values = {
        name: getattr(model_config, name, None) for name in sorted(names) if training or not name.endswith(_OF_TRAINING)
    }
    rope = values.get("rope_parameters")
    if rope is not None and "rope_type" in rope:
        redundant = ("type", "partial_rotary_factor")
        values["rope_parameters"] = {key: rope[key] for key in rope if rope[key] is not None and key not in redundant}
    return values


def function_differences(theirs: PreTrainedConfig, ours: PreTrainedConfig) -> list[tuple[str, Any, Any]]:
    """(key, their value, our value) for every key that makes two models with the same weights compute different things.

    The number of positions is such a key only if rotary embeddings are stretched to it.
    """
    if theirs.model_type != ours.model_type:
        return [("model_type", theirs.model_type, ours.model_type)]
    there = compared_keys(theirs)
    here = compared_keys(ours)
    if "max_position_embeddings" in here and (here.get("rope_parameters") or {}).get("rope_type") not in _STRETCHED:
        here["max_position_embeddings"] = there["max_position_embeddings"]
    return [(key, there[key], here[key]) for key in here if there[key] != here[key]]


def positions_in(model_config: PreTrainedConfig) -> int | None:
    """The longest input of a model in tokens; None if its config has no limit, which some configs write as -1."""
    positions = getattr(model_config, "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None


def check_length(
    model_config: PreTrainedConfig, sequence_length: int, source: str, *, separate_documents: bool = False
) -> None:
    """Raises :class:`ConfigError` if sequences are longer than the model's positions.

    ``source`` is the config file. ``separate_documents``: each document in a sequence has its own positions.
    """
    rope: dict[str, Any] = getattr(model_config, "rope_parameters", None) or {}
    # longrope switches to other frequencies if the longest document of a batch is longer
    longest = rope[ORIGINAL] if separate_documents and rope.get("rope_type") == "longrope" else None
    positions = positions_in(model_config)
    limits = [
        (positions, "max_position_embeddings", "shorten it, or set model.overrides.max_position_embeddings"),
        (longest, ORIGINAL, "longrope then depends on the other documents; shorten it, or pack without a mask"),
    ]
    for limit, name, remedy in limits:
        if limit is not None and limit < sequence_length:
            fault = f"data.sequence_length: {sequence_length} is more than the model's {name} ({limit}); {remedy}"
            raise ConfigError([fault], source)


def plain_model_config(model_config: PreTrainedConfig) -> dict[str, Any]:
    """The model's settings without the keys that transformers adds about itself."""
    about_itself = ("transformers_version", "_name_or_path", "architectures", "dtype")
    values = json.loads(model_config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in about_itself}
