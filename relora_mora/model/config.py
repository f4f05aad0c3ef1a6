"""Reads, checks and compares configs of models.

Transformers checks the type of each value. What it would accept although the model would be another one, or fail later,
is checked here; ``config_keys`` has the rule for each key.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from relora_mora.adapters.inject import decoder_layers
from relora_mora.config.load import ConfigError, relative_to
from relora_mora.config.schema import ModelConfig
from relora_mora.config.shipped import MODELS, shipped_files
from relora_mora.model.causal import empty_model
from relora_mora.model.config_keys import (
    ALIAS,
    EXPORT,
    FUNCTION,
    NOTHING,
    ORIGINAL,
    RANGES,
    TRAINING,
    Architecture,
    Only,
    architecture_for,
    feed_forward_width,
    head_width,
    model_types,
)

LARGEST_MATRIX = 2**40  # elements
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
        near = get_close_matches(str(path), shipped_files(MODELS), n=1)
        remedy = f"did you mean {near[0]}?" if near else "give a file, or a name such as llama_130m"
        fault = f"{setting}: cannot read it ({error.strerror}); {remedy}"
        raise ConfigError([fault + relative_to(path)], str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{setting}: not JSON ({error}); give the config.json of a model"], str(path)) from error
    if not isinstance(values, dict):
        fault = f"{setting}: holds a {type(values).__name__}, expected an object; give the config.json of a model"
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

    A key that the family does not have is ignored if its value is null or false, so that an override can remove a key
    of the file. The model is built without its weights, since transformers finds most faults there.
    """
    architecture = architecture_of(values, source)
    config_class = architecture.config_class
    used = _used(architecture, values)
    if used.get("num_key_value_heads", 0) is None:  # in transformers this means the number of attention heads
        used["num_key_value_heads"] = used.get("num_attention_heads", config_class().num_attention_heads)
    if used.get("pad_token_id") == -1:
        used["pad_token_id"] = None  # old exports write -1 for none; an embedding would use its last row
    wrong = [*_value_faults(config_class, used), *_disagreements(used)]
    if ORIGINAL not in {field.name for field in fields(config_class)}:
        _put_inside(used, used.pop(ORIGINAL, None))
    # null is a value only for keys that an export carries over; otherwise it means the default of the config class
    kept = {key: value for key, value in used.items() if value is not None or architecture.keys[key] == EXPORT}
    faults = [*_key_faults(architecture, values), *wrong]
    if not wrong:
        try:
            model_config = config_class(**kept)
            faults += _model_faults(model_config)
        except Exception as error:  # transformers raises nearly any kind
            rope = f" with rope_parameters {_shown(kept['rope_parameters'])}" if "rope_parameters" in kept else ""
            faults.append(f"{_shown(error)}, in a {config_class.__name__}{rope}; correct it")
    if faults:
        raise ConfigError([f"model: {fault}" for fault in faults], source)
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
        if rule is None and value is not None and value is not False:
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
    """Yields faults of sizes that do not fit together, and of the model, which this builds without its weights."""
    if model_config.get_text_config() is not model_config:
        yield f"a {model_config.model_type} is more than a language model; use the type of its text part"
        return
    heads = getattr(model_config, "num_attention_heads", None)
    shared = getattr(model_config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        yield f"num_key_value_heads is {shared}, expected a divisor of num_attention_heads {heads}"
    if getattr(model_config, "rope_parameters", None) and head_width(model_config) % 2:
        yield f"head_dim is {head_width(model_config)}, expected an even number, since rotary embeddings rotate pairs"
    rows = model_config.vocab_size
    for key in ("short_factor", "long_factor"):
        factors = (getattr(model_config, "rope_parameters", None) or {}).get(key)
        if factors is not None and len(factors) != head_width(model_config) // 2:
            yield f"rope_parameters: {key} has {len(factors)} numbers, expected {head_width(model_config) // 2}"
    if model_config.pad_token_id is not None and model_config.pad_token_id >= rows:
        yield f"pad_token_id is {model_config.pad_token_id}, expected less than vocab_size {rows}, or null"
        return
    if model_config.hidden_size * max(rows, feed_forward_width(model_config)) > LARGEST_MATRIX:
        yield f"a matrix would have more than {LARGEST_MATRIX:,} elements; lower its sizes"
        return
    lm = empty_model(model_config)
    if not decoder_layers(lm) or not isinstance(lm.get_output_embeddings(), nn.Linear):
        yield f"a {model_config.model_type} has no layers that can be checkpointed, or no output head; use another type"


def _value_faults(config_class: type[PreTrainedConfig], values: Mapping[str, Any]) -> Iterator[str]:
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
        rope = value if key == "rope_parameters" and isinstance(value, dict) else {}
        yield from _range_faults(key, value)
        yield from _range_faults("rope_theta", rope.get("rope_theta"))
        if key == "hidden_act" and (value not in ACT2FN or ACT2FN[value].state_dict()) and value != "xielu":
            yield f"{key} is {_shown(value)}, expected an activation without parameters, such as silu"


def _put_inside(values: dict[str, Any], original: int | None) -> None:
    """Puts a number of positions that stood next to the rope parameters into them, if their type uses it.

    Transformers leaves it where it is, and stretches from another number.
    """
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        if original is not None and isinstance(rope, dict):
            kind = rope.get("rope_type", rope.get("type"))
            if kind in ("yarn", "longrope", "llama3"):
                values[name] = {ORIGINAL: original, **rope}


def _disagreements(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields faults of values that have two names and are not the same; transformers would take either of them."""
    found = values["rope_parameters"] if isinstance(values.get("rope_parameters"), dict) else {}
    scaling = values["rope_scaling"] if isinstance(values.get("rope_scaling"), dict) else {}
    renamed = {("rope_type" if key == "type" else key): value for key, value in scaling.items()}
    older = {key: values[key] for key in ("rope_theta", ORIGINAL) if values.get(key) is not None} | renamed
    for key, value in older.items():
        if key in found and found[key] != value:
            yield f"{key} is {_shown(found[key])} and, by an older name, {_shown(value)}; keep one of them"


def _range_faults(key: str, value: Any) -> Iterator[str]:
    if key not in RANGES or value is None:
        return
    least, most = RANGES[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        yield f"{key} is {_shown(value)}, expected a number from {least} to {most}"


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
    text = re.sub(r"^Class validation error for validator '\w+': \w+: ", "", text)  # by huggingface_hub
    return text if len(text) < 160 else text[:157] + "..."


def check_length(
    model_config: PreTrainedConfig, sequence_length: int, source: str, *, separate_documents: bool = False
) -> None:
    """Raises :class:`ConfigError` if sequences are longer than the model's positions.

    ``source`` is the config file. ``separate_documents``: each document in a sequence has its own positions.
    """
    positions = getattr(model_config, "max_position_embeddings", None)
    rope: dict[str, Any] = getattr(model_config, "rope_parameters", None) or {}
    # longrope switches to other frequencies if the longest document of a batch is longer
    longest = rope[ORIGINAL] if separate_documents and rope.get("rope_type") == "longrope" else None
    limits = [
        (positions, "max_position_embeddings", "shorten it, or set model.overrides.max_position_embeddings"),
        (longest, ORIGINAL, "longrope then depends on the other documents; shorten it, or pack without a mask"),
    ]
    for limit, name, remedy in limits:
        if limit is not None and 0 < limit < sequence_length:  # some configs write no limit as -1
            fault = f"data.sequence_length: {sequence_length} is more than the model's {name} ({limit}); {remedy}"
            raise ConfigError([fault], source)


def plain_model_config(model_config: PreTrainedConfig) -> dict[str, Any]:
    """The model's settings without the keys that transformers adds about itself."""
    about_itself = ("transformers_version", "_name_or_path", "architectures", "dtype")
    values = json.loads(model_config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in about_itself}
