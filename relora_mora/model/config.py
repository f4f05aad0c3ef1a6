"""Reads, checks and compares configs of the LLaMA family, and derives shapes from them.

Transformers checks the type of each value. What it would accept although the model would be another one, or fail later,
is checked here; ``config_keys`` has the rule for each key.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from relora_mora.config.load import ConfigError, relative_to
from relora_mora.config.schema import ModelConfig
from relora_mora.model.config_keys import (
    ALIAS,
    ARCHITECTURES,
    EXPORT,
    FUNCTION,
    ORIGINAL,
    RANGES,
    ROPE_KEYS,
    TRAINING,
    Architecture,
    Only,
)

LARGEST_FILE = 16 * 2**20  # bytes; a config has a few thousand
LARGEST_MODEL = 2**42  # parameters
_FACTORS = ("short_factor", "long_factor")
_STRETCHED = ("dynamic", "yarn", "longrope")  # rope types that may depend on max_position_embeddings


def head_width(model_config: PreTrainedConfig) -> int:
    """The number of features of an attention head."""
    width: int = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
    return width


def attention_widths(model_config: PreTrainedConfig) -> tuple[int, int]:
    """The number of features of one token's queries, and of its keys; the values have as many as the keys."""
    heads = model_config.num_attention_heads
    shared_heads = model_config.num_key_value_heads or heads
    return heads * head_width(model_config), shared_heads * head_width(model_config)


def linear_shapes(model_config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear of a decoder layer, by name."""
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
        with path.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE:,} bytes")
        values = json.loads(content)
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

    Raises :class:`ConfigError` if the type is not in the family.
    """
    kind = "llama" if values.get("model_type") is None else values["model_type"]
    if kind not in list(ARCHITECTURES):
        known = ", ".join(ARCHITECTURES)
        fault = f"model: model_type is {_shown(kind)}, expected one of {known}; other kinds of models are not supported"
        raise ConfigError([fault], source)
    return ARCHITECTURES[kind]


def parse_model_config(values: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """Builds a config from these keys, without those that do nothing; raises :class:`ConfigError` with every fault.

    An unknown key is ignored if its value is null, so that an override can remove a key of the file.
    """
    architecture = architecture_of(values, source)
    config_class = architecture.config_class
    defaults = {field.name: field.default for field in fields(config_class)}
    used = _used(architecture, values)
    if used.get("num_key_value_heads", 0) is None:  # in transformers this means the number of attention heads
        used["num_key_value_heads"] = used.get("num_attention_heads", defaults["num_attention_heads"])
    faults = [*_key_faults(architecture, values)]
    wrong = [*_value_faults(config_class, used)]
    # null is a value only for keys that an export carries over; otherwise it means the default of the config class
    kept = {key: value for key, value in used.items() if value is not None or architecture.keys[key] == EXPORT}
    faults += wrong or [*_unify_names(kept), *_shape_faults({**defaults, **kept})]
    if faults:
        raise ConfigError(faults, source)
    try:
        model_config = config_class(**kept)
        LlamaRotaryEmbedding(config=model_config)  # type: ignore[arg-type]  # the same in the whole family
    except Exception as error:
        rope = _shown(kept["rope_parameters"])
        fault = f"model: {config_class.__name__} with rope_parameters {rope} is refused: {_shown(error)}; correct it"
        raise ConfigError([fault], source) from error
    windowed = getattr(model_config, "sliding_window", None) is not None
    allowed = ["full_attention", "sliding_attention"] if windowed else ["full_attention"]
    if not set(getattr(model_config, "layer_types", None) or ()) <= set(allowed):
        window = "a sliding_window" if windowed else "no sliding_window"
        fault = f"model: layer_types may only have {' and '.join(allowed)} with {window}; set layer_types to null"
        raise ConfigError([fault], source)
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
            yield f"model: {key} is not a key of a {name}; set it to null in model.overrides to leave it out"
        elif isinstance(rule, Only) and value not in (None, rule.value):
            yield f"model: {key} is {_shown(value)}, expected {json.dumps(rule.value)}: {rule.remedy}"
    classes = values.get("architectures")
    prefix = architecture.prefix
    if isinstance(classes, list) and not all(str(name).lower().startswith(prefix.lower()) for name in classes):
        yield f"model: architectures is {_shown(classes)}, expected classes such as {prefix}ForCausalLM; set model_type"


def _value_faults(config_class: type[PreTrainedConfig], values: Mapping[str, Any]) -> Iterator[str]:
    """Yields faults of single values: of their types, which transformers knows, and of what it does not check."""
    probe = config_class()
    kinds = {field.name: field.type for field in fields(config_class)}
    for key, value in values.items():
        try:
            if key in kinds:
                setattr(probe, key, value)
            if key == "hidden_act" and (value not in ACT2FN or ACT2FN[value].state_dict()):
                yield f"model: {key} is {_shown(value)}, expected an activation without parameters, such as silu"
            fits = value is None or _in_range(key, value)
        except StrictDataclassFieldValidationError:
            fits = False
        if not fits:
            kind = kinds.get(key)
            expected = _range(key) if key in RANGES else kind.__name__ if isinstance(kind, type) else kind
            yield f"model: {key} is {_shown(value)}, expected {expected}"


def _in_range(key: str, value: Any) -> bool:
    if key not in RANGES:
        return True
    least, most = RANGES[key]
    kinds = (int, float) if isinstance(least, float) else (type(least),)
    return type(value) in kinds and bool(least <= value <= most)


def _range(key: str) -> str:
    least, most = RANGES[key]
    return f"{type(least).__name__} from {least} to {most}"


def keys_with(model_config: PreTrainedConfig, *uses: str) -> dict[str, Any]:
    """The keys of a config that have one of these uses, normalized so that two configs can be compared."""
    keys = ARCHITECTURES[model_config.model_type].keys
    values = {key: getattr(model_config, key, None) for key, rule in keys.items() if rule in uses}
    rope = values.get("rope_parameters")
    if rope is not None:
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
    if here["rope_parameters"]["rope_type"] not in _STRETCHED:
        here["max_position_embeddings"] = there["max_position_embeddings"]
    return [(key, there[key], here[key]) for key in here if there[key] != here[key]]


def _shown(value: Any) -> str:
    text = " ".join(str(value).split()) if isinstance(value, Exception) else repr(value)
    return text if len(text) < 160 else text[:157] + "..."


def _unify(values: dict[str, Any], key: str, value: Any, name: str) -> Iterator[str]:
    """Sets a key to the value that ``name`` has; yields a fault if it has another one."""
    if value is not None and values.setdefault(key, value) != value:
        yield f"model: {key} is {_shown(values[key])} and, in {name}, {_shown(value)}; keep one of them"


def _unify_names(values: dict[str, Any]) -> Iterator[str]:
    """Leaves one name for each value, and one mapping, ``rope_parameters``; yields faults, such as a disagreement."""
    yield from _unify(values, "max_position_embeddings", values.pop("max_sequence_length", None), "max_sequence_length")
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        part = values.pop(name, None)
        part = {name: part} if name == "rope_theta" else part or {}
        if not isinstance(part, dict):
            yield f"model: {name} is {_shown(part)}, expected a mapping or null"
            continue
        for key, value in part.items():  # transformers 4 also had "type"
            yield from _unify(rope, "rope_type" if key == "type" else key, value, name)
    values["rope_parameters"] = rope
    kind = rope.setdefault("rope_type", "default")
    if kind not in list(ROPE_KEYS):
        yield f"model: rope_parameters: rope_type is {_shown(kind)}, expected one of {', '.join(ROPE_KEYS)}"
        return
    # transformers also accepts this key outside of rope_parameters, and ignores it for rope types that do not have it
    original = values.pop(ORIGINAL, None)
    if ORIGINAL in ROPE_KEYS[kind]:
        yield from _unify(rope, ORIGINAL, original, "the config itself")
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    for key, value in rope.items():
        if key not in ("rope_type", "rope_theta", *ROPE_KEYS[kind]):
            yield f"model: rope_parameters: {key} is not a key of the rope_type {kind}; leave it out"
        elif key not in _FACTORS and not _in_range(key, value):
            yield f"model: rope_parameters: {key} is {_shown(value)}, expected {_range(key)}"


def _shape_faults(size: Mapping[str, Any]) -> Iterator[str]:
    """Yields faults of sizes that are valid by themselves but do not fit together."""
    hidden = size["hidden_size"]
    heads = size["num_attention_heads"]
    vocabulary = size["vocab_size"]
    shared: int = size["num_key_value_heads"] or heads
    head: int = size.get("head_dim") or hidden // heads
    if hidden % heads:
        yield f"model: hidden_size is {hidden}, expected a multiple of num_attention_heads {heads}"
    elif head % 2:
        yield f"model: head_dim is {head}, expected an even number, since rotary embeddings rotate pairs"
    if heads % shared:
        yield f"model: num_key_value_heads is {shared}, expected a divisor of num_attention_heads {heads}"
    for key in [key for key in _FACTORS if key in size["rope_parameters"]]:
        numbers = size["rope_parameters"][key]
        if not isinstance(numbers, list) or len(numbers) != head // 2 or not all(_in_range(key, x) for x in numbers):
            expected = f"{head // 2} numbers, half of head_dim, each {_range(key)}"
            yield f"model: rope_parameters: {key} is {_shown(numbers)}, expected {expected}"
    layer = hidden * (2 * head * (heads + shared) + 3 * size["intermediate_size"])
    parameters = size["num_hidden_layers"] * layer + hidden * vocabulary
    if parameters > LARGEST_MODEL:
        yield f"model: it would have {parameters:,} parameters, expected at most {LARGEST_MODEL:,}; lower its sizes"
    padding = size["pad_token_id"]
    if padding is not None and not -1 <= padding < vocabulary:
        yield f"model: pad_token_id is {padding}, expected less than vocab_size {vocabulary}, or null"


def length_of_documents(model_config: PreTrainedConfig) -> int | None:
    """The longest sequence in which each document has its own positions; None means ``max_position_embeddings``.

    Rotary embeddings of the type longrope switch to other frequencies if the longest document of a batch is longer.
    """
    rope: dict[str, Any] = getattr(model_config, "rope_parameters", None) or {}
    return rope[ORIGINAL] if rope.get("rope_type") == "longrope" else None


def check_length(
    model_config: PreTrainedConfig, sequence_length: int, source: str, *, separate_documents: bool = False
) -> None:
    """Raises :class:`ConfigError` if sequences are longer than the model's positions or its attention window.

    ``source`` is the config file. ``separate_documents``: each document in a sequence has its own positions.
    """
    positions = model_config.max_position_embeddings
    layers = getattr(model_config, "layer_types", None)
    windowed = layers is None or "sliding_attention" in layers
    window = getattr(model_config, "sliding_window", None) if windowed else None
    longest = length_of_documents(model_config) if separate_documents else None
    fault = None
    if sequence_length > positions:
        fault = (
            f"the model's max_position_embeddings ({positions}); shorten it or set "
            "model.overrides.max_position_embeddings"
        )
    elif window is not None and sequence_length > window:
        fault = f"the model's sliding_window ({window}), but attention here sees every position before it; shorten it"
    elif longest is not None and sequence_length > longest:
        fault = (
            f"{ORIGINAL} ({longest}), beyond which the longest document decides longrope's frequencies for its batch; "
            "shorten it, or pack documents without a mask"
        )
    if fault is not None:
        raise ConfigError([f"data.sequence_length: {sequence_length} is more than {fault}"], source)


def plain_model_config(model_config: PreTrainedConfig) -> dict[str, Any]:
    """The model's settings without the keys that transformers adds about itself."""
    about_itself = ("transformers_version", "_name_or_path", "architectures", "dtype")
    values = json.loads(model_config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in about_itself}
