"""Reads, checks and compares configs of the LLaMA family, and derives shapes from them.

Transformers checks the type of each value. What it would accept although the model would be another one, or fail later,
is checked here; ``config_keys`` has the rule for each key.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from relora_mora.config.load import ConfigError, relative_to
from relora_mora.config.schema import ModelConfig
from relora_mora.model.causal import decoder_layers, empty_model
from relora_mora.model.config_keys import (
    ALIAS,
    EXPORT,
    FUNCTION,
    NOTHING,
    ORIGINAL,
    RANGES,
    ROPE_KEYS,
    TRAINING,
    Architecture,
    Only,
    architecture_for,
    model_types,
)
from relora_mora.model.widths import attention_widths, head_width

LARGEST_MODEL = 2**42  # parameters
_STRETCHED = ("dynamic", "yarn", "longrope")  # rope types that may depend on max_position_embeddings


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


def read_json(path: Path, setting: str) -> dict[str, Any]:
    """The keys in a config.json. Raises :class:`ConfigError`, with the name of the setting, if it cannot be read."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        fault = f"{setting}: cannot read it ({error.strerror}); give a file, or a name such as llama_130m"
        raise ConfigError([fault + relative_to(path)], str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{setting}: not JSON ({error}); give the config.json of a LLaMA"], str(path)) from error
    if not isinstance(values, dict):
        fault = f"{setting}: holds a {type(values).__name__}, expected an object; give the config.json of a LLaMA"
        raise ConfigError([fault], str(path))
    return values


def architecture_of(values: Mapping[str, Any], source: str) -> Architecture:
    """The architecture for a config's ``model_type``, by default a LLaMA.

    Raises :class:`ConfigError` if transformers has no causal language model of this type.
    """
    kind = "llama" if values.get("model_type") is None else values["model_type"]
    found = architecture_for(kind) if isinstance(kind, str) else None
    if found is None:
        near = get_close_matches(str(kind), model_types())
        known = f"did you mean {' or '.join(near)}?" if near else "such as llama, qwen3 or gemma2"
        fault = f"model: model_type is {_shown(kind)}, expected a causal language model of transformers; {known}"
        raise ConfigError([fault], source)
    return found


def parse_model_config(values: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """Builds a config from these keys, without those that do nothing; raises :class:`ConfigError` with every fault.

    An unknown key is ignored if its value is null, so that an override can remove a key of the file.
    """
    architecture = architecture_of(values, source)
    config_class = architecture.config_class
    used = _used(architecture, values)
    if used.get("num_key_value_heads", 0) is None:  # in transformers this means the number of attention heads
        used["num_key_value_heads"] = used.get("num_attention_heads", config_class().num_attention_heads)
    # null is a value only for keys that an export carries over; otherwise it means the default of the config class
    kept = {key: value for key, value in used.items() if value is not None or architecture.keys[key] == EXPORT}
    wrong = [*_value_faults(config_class, used, known=architecture.known)]
    if architecture.known:
        wrong = wrong or [*_unify_names(kept)]
    faults = [*_key_faults(architecture, values), *wrong]
    if not wrong:
        try:
            model_config = config_class(**kept)
            if architecture.known:
                faults += _shape_faults(model_config)
                LlamaRotaryEmbedding(config=model_config)  # type: ignore[arg-type]  # the same in the whole family
            else:
                faults += _model_faults(model_config)
        except Exception as error:
            rope = f" with rope_parameters {_shown(kept['rope_parameters'])}" if "rope_parameters" in kept else ""
            faults.append(f"{_shown(error)}, in a {config_class.__name__}{rope}; correct it")
    if faults:
        raise ConfigError([f"model: {fault}" for fault in faults], source)
    if model_config.pad_token_id == -1:
        model_config.pad_token_id = None  # old exports write -1 for none; an embedding would use its last row
    model_config.use_cache = False
    return model_config


def stored_model_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config in a checkpoint's manifest, without foreign keys and names of code.

    Raises whatever transformers raises if it cannot build the config.
    """
    architecture = architecture_of(values, "the manifest")
    return architecture.config_class(**_used(architecture, values))


def _used(architecture: Architecture, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that matter in training or in an export, without ``model_type``."""
    uses = (FUNCTION, TRAINING, ALIAS, EXPORT)
    return {key: values[key] for key in values if architecture.keys.get(key) in uses and key != "model_type"}


def _key_faults(architecture: Architecture, values: Mapping[str, Any]) -> Iterator[str]:
    """Yields faults of unknown keys, of keys that may only have one value, and of classes of another kind of model."""
    for key, value in values.items():
        rule = architecture.keys.get(key)
        if rule is None and value is not None:
            name = architecture.config_class.__name__
            near = get_close_matches(key, [each for each, known in architecture.keys.items() if known != NOTHING], n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            yield f"{key} is not a key of a {name}{meant}; set it to null in model.overrides to leave it out"
        elif isinstance(rule, Only) and value not in (None, rule.value):
            yield f"{key} is {_shown(value)}, expected {json.dumps(rule.value)}: {rule.remedy}"
    classes = values.get("architectures")
    prefix = architecture.prefix
    if isinstance(classes, list) and not all(str(name).lower().startswith(prefix.lower()) for name in classes):
        yield f"architectures is {_shown(classes)}, expected classes such as {prefix}ForCausalLM; set model_type"


def _model_faults(model_config: PreTrainedConfig) -> Iterator[str]:
    """Yields faults of a model outside of the LLaMA family, which this builds without its weights."""
    if model_config.get_text_config() is not model_config:
        yield f"a {model_config.model_type} is more than a language model; use the type of its text part"
        return
    layers = getattr(model_config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > RANGES["num_hidden_layers"][1]:
        yield f"num_hidden_layers is {layers}, expected at most {RANGES['num_hidden_layers'][1]}"
        return
    lm = empty_model(model_config)
    parameters = sum(parameter.numel() for parameter in lm.parameters())
    if parameters > LARGEST_MODEL:
        yield f"it would have {parameters:,} parameters, expected at most {LARGEST_MODEL:,}; lower its sizes"
    if not decoder_layers(lm) or not isinstance(lm.get_output_embeddings(), nn.Linear):
        yield f"a {model_config.model_type} has no layers that can be checkpointed, or no output head; use another type"


def _value_faults(config_class: type[PreTrainedConfig], values: Mapping[str, Any], *, known: bool) -> Iterator[str]:
    """Yields faults of single values: of their types, which transformers knows, and of what it does not check."""
    probe = config_class()
    kinds = {field.name: field.type for field in fields(config_class)}
    for key, value in values.items():
        try:
            if key in kinds:
                setattr(probe, key, value)
        except StrictDataclassFieldValidationError:
            yield f"{key} is {_shown(value)}, expected {getattr(kinds[key], '__name__', kinds[key])}"
            continue
        if value is not None and known:
            yield from _range_faults(key, key, value)
        if known and key == "hidden_act" and (value not in ACT2FN or ACT2FN[value].state_dict()):
            yield f"{key} is {_shown(value)}, expected an activation without parameters, such as silu"
    heads = probe.num_attention_heads if known else 0
    if heads and probe.hidden_size % heads:
        yield f"hidden_size is {_shown(probe.hidden_size)}, expected a multiple of num_attention_heads {heads}"


def _range_faults(name: str, key: str, value: Any) -> Iterator[str]:
    if key in RANGES:
        least, most = RANGES[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            yield f"{name} is {_shown(value)}, expected a number from {least} to {most}"


def keys_with(model_config: PreTrainedConfig, *uses: str) -> dict[str, Any]:
    """The keys of a config that have one of these uses, normalized so that two configs can be compared."""
    keys = architecture_of({"model_type": model_config.model_type}, "the model").keys
    values = {key: getattr(model_config, key, None) for key, rule in keys.items() if rule in uses}
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
    there = keys_with(theirs, FUNCTION)
    here = keys_with(ours, FUNCTION)
    if "max_position_embeddings" in here and (here.get("rope_parameters") or {}).get("rope_type") not in _STRETCHED:
        here["max_position_embeddings"] = there["max_position_embeddings"]
    return [(key, there[key], here[key]) for key in here if there[key] != here[key]]


def _shown(value: Any) -> str:
    text = " ".join(str(value).split()) if isinstance(value, Exception) else repr(value)
    return text if len(text) < 160 else text[:157] + "..."


def _unify(values: dict[str, Any], key: str, value: Any, name: str) -> Iterator[str]:
    """Sets a key to the value that ``name`` has; yields a fault if it has another one."""
    if value is not None and values.setdefault(key, value) != value:
        yield f"{key} is {_shown(values[key])} and, in {name}, {_shown(value)}; keep one of them"


def _unify_names(values: dict[str, Any]) -> Iterator[str]:
    """Leaves one name for each value, and one mapping, ``rope_parameters``; yields faults, such as a disagreement."""
    yield from _unify(values, "max_position_embeddings", values.pop("max_sequence_length", None), "max_sequence_length")
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        part = values.pop(name, None)
        part = {name: part} if name == "rope_theta" else part or {}
        if not isinstance(part, dict):
            yield f"{name} is {_shown(part)}, expected a mapping or null"
            continue
        for key, value in part.items():  # transformers 4 also had "type"
            yield from _unify(rope, "rope_type" if key == "type" else key, value, name)
    values["rope_parameters"] = rope
    kind = rope.setdefault("rope_type", "default")
    if kind not in list(ROPE_KEYS):
        yield f"rope_parameters: rope_type is {_shown(kind)}, expected one of {', '.join(ROPE_KEYS)}"
        return
    # transformers also accepts this key outside of rope_parameters, and ignores it for rope types that do not have it
    original = values.pop(ORIGINAL, None)
    if ORIGINAL in ROPE_KEYS[kind]:
        yield from _unify(rope, ORIGINAL, original, "the config itself")
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    for key, value in rope.items():
        if key not in ("rope_type", "rope_theta", *ROPE_KEYS[kind]):
            yield f"rope_parameters: {key} is not a key of the rope_type {kind}; leave it out"
        for each in value if isinstance(value, list) else [value]:
            yield from _range_faults(f"rope_parameters: {key}", key, each)


def _shape_faults(config: PreTrainedConfig) -> Iterator[str]:
    """Yields faults of sizes that transformers accepts although they do not fit together."""
    heads = config.num_attention_heads
    shared = config.num_key_value_heads
    head = head_width(config)
    if head % 2:
        yield f"head_dim is {head}, expected an even number, since rotary embeddings rotate pairs"
    if heads % shared:
        yield f"num_key_value_heads is {shared}, expected a divisor of num_attention_heads {heads}"
    rope = config.rope_parameters
    for key in ("short_factor", "long_factor"):
        if key in rope and (not isinstance(rope[key], list) or len(rope[key]) != head // 2):
            yield f"rope_parameters: {key} is {_shown(rope[key])}, expected {head // 2} numbers, half of head_dim"
    windowed = getattr(config, "sliding_window", None) is not None
    if not set(getattr(config, "layer_types", None) or ()) <= {"full_attention", *["sliding_attention"] * windowed}:
        yield "layer_types may only have full_attention and, with a sliding_window, sliding_attention; set it to null"
    parameters = config.hidden_size * config.vocab_size
    queries, keys = attention_widths(config)
    of_layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    parameters += config.num_hidden_layers * of_layer
    if parameters > LARGEST_MODEL:
        yield f"it would have {parameters:,} parameters, expected at most {LARGEST_MODEL:,}; lower its sizes"
    padding = config.pad_token_id
    if padding is not None and padding >= config.vocab_size:
        yield f"pad_token_id is {padding}, expected less than vocab_size {config.vocab_size}, or null"


def length_of_documents(model_config: PreTrainedConfig) -> int | None:
    """The longest sequence in which each document has its own positions; None means ``max_position_embeddings``.

    Rotary embeddings of the type longrope switch to other frequencies if the longest document of a batch is longer.
    """
    rope: dict[str, Any] = getattr(model_config, "rope_parameters", None) or {}
    return rope[ORIGINAL] if rope.get("rope_type") == "longrope" else None


def check_length(
    model_config: PreTrainedConfig, sequence_length: int, source: str, *, separate_documents: bool = False
) -> None:
    """Raises :class:`ConfigError` if sequences are longer than the model's positions.

    ``source`` is the config file. ``separate_documents``: each document in a sequence has its own positions.
    """
    positions = getattr(model_config, "max_position_embeddings", None)
    longest = length_of_documents(model_config) if separate_documents else None
    limits = [
        (positions, "max_position_embeddings", "shorten it, or set model.overrides.max_position_embeddings"),
        (longest, ORIGINAL, "longrope then depends on the other documents; shorten it, or pack without a mask"),
    ]
    for limit, name, remedy in limits:
        if limit is not None and sequence_length > limit:
            fault = f"data.sequence_length: {sequence_length} is more than the model's {name} ({limit}); {remedy}"
            raise ConfigError([fault], source)


def plain_model_config(model_config: PreTrainedConfig) -> dict[str, Any]:
    """The model's settings without the keys that transformers adds about itself."""
    about_itself = ("transformers_version", "_name_or_path", "architectures", "dtype")
    values = json.loads(model_config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in about_itself}
