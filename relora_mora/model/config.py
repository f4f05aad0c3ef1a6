"""Reads, checks and compares configs of the LLaMA family, and derives shapes from them.

``config_keys`` has the rule for each key.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from relora_mora.config.load import ConfigError, relative_to
from relora_mora.config.schema import ModelConfig
from relora_mora.model import config_keys

LARGEST_FILE = 16 * 2**20  # bytes; a config has a few thousand
LARGEST_MODEL = 2**42  # parameters
_ORIGINAL = "original_max_position_embeddings"
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


def architecture_of(values: Mapping[str, Any], source: str) -> config_keys.Architecture:
    """The architecture for a config's ``model_type``, by default a LLaMA.

    Raises :class:`ConfigError` if the type is not in the family.
    """
    kind = values.get("model_type")
    if kind is None:
        kind = "llama"
    if not isinstance(kind, str) or kind not in config_keys.ARCHITECTURES:
        fault = (
            f"model: model_type is {_shown(kind)}, expected one of {', '.join(config_keys.ARCHITECTURES)}; "
            "other kinds of models are not supported"
        )
        raise ConfigError([fault], source)
    return config_keys.ARCHITECTURES[kind]


def parse_model_config(values: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """Builds a config from these keys, without those that do nothing; raises :class:`ConfigError` with every fault.

    An unknown key is ignored if its value is null, so that an override can remove a key of the file.
    """
    architecture = architecture_of(values, source)
    keys = architecture.keys
    name = architecture.config_class.__name__
    defaults = {field.name: field.default for field in dataclasses.fields(architecture.config_class)}
    unknown = [key for key, value in values.items() if key not in keys and value is not None]
    bad = [key for key in values if key in keys and not keys[key].accepts(values[key])]
    remedy = "set it to null in model.overrides to leave it out"
    faults = [f"model: {key} is not a key of a {name}; {remedy}" for key in unknown]
    faults += [f"model: {key} is {_shown(values[key])}, expected {keys[key].expected}" for key in bad]
    kept: dict[str, Any] = {}
    for key, value in values.items():
        use = keys[key].use if key in keys else config_keys.NOTHING
        # null is a value only for keys that an export carries over; otherwise it means the default of the config class
        if use == config_keys.EXPORT or (
            use in (config_keys.FUNCTION, config_keys.TRAINING, config_keys.ALIAS) and value is not None
        ):
            kept[key] = value
    if values.get("num_key_value_heads", 0) is None:  # in transformers this means the number of attention heads
        kept["num_key_value_heads"] = kept.get("num_attention_heads", defaults["num_attention_heads"])
    if all(keys[key].use not in (config_keys.FUNCTION, config_keys.ALIAS, config_keys.EXPORT) for key in bad):
        faults += [*_unify_length(kept), *_unify_rope(kept), *_shape_faults(kept, defaults)]
    if faults:
        raise ConfigError(faults, source)
    try:
        model_config = _build(architecture, kept)
        rotary = LlamaRotaryEmbedding(config=model_config)  # type: ignore[arg-type]  # the same in the whole family
    except Exception as error:
        raise ConfigError([f"model: {name} refuses it: {' '.join(str(error).split())}"], source) from error
    if not (0 < rotary.inv_freq.min() <= rotary.inv_freq.max() < math.inf and 0 < rotary.attention_scaling < math.inf):
        shown = _shown(kept["rope_parameters"])
        raise ConfigError([f"model: rope_parameters: the frequencies of {shown} are not finite; correct them"], source)
    if (
        "sliding_attention" in (getattr(model_config, "layer_types", None) or ())
        and model_config.sliding_window is None
    ):
        fault = "model: layer_types has sliding_attention, but sliding_window is null; set layer_types to null too"
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
    uses = {key: architecture.keys[key].use for key in values if key in architecture.keys}
    return _build(
        architecture,
        {key: values[key] for key, use in uses.items() if use not in (config_keys.NOTHING, config_keys.ONLY)},
    )


def _build(architecture: config_keys.Architecture, values: Mapping[str, Any]) -> PreTrainedConfig:
    return architecture.config_class(**{key: value for key, value in values.items() if key != "model_type"})


def keys_with(model_config: PreTrainedConfig, *uses: str) -> dict[str, Any]:
    """The keys of a config that have one of these uses, normalized so that two configs can be compared."""
    keys = config_keys.ARCHITECTURES[model_config.model_type].keys
    values = {key: getattr(model_config, key, None) for key, rule in keys.items() if rule.use in uses}
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
    there = keys_with(theirs, config_keys.FUNCTION)
    here = keys_with(ours, config_keys.FUNCTION)
    if here["rope_parameters"]["rope_type"] not in _STRETCHED:
        here["max_position_embeddings"] = there["max_position_embeddings"]
    return [(key, there[key], here[key]) for key in here if there[key] != here[key]]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _unify_length(values: dict[str, Any]) -> Iterator[str]:
    """Leaves one name for the number of positions; yields a fault if the two names disagree."""
    length = values.pop("max_sequence_length", None)
    if length is not None and values.setdefault("max_position_embeddings", length) != length:
        other = values["max_position_embeddings"]
        yield (
            f"model: max_sequence_length is {length} and max_position_embeddings {other}, which mean the same; "
            "set one of them to null"
        )


def _unify_rope(values: dict[str, Any]) -> Iterator[str]:
    """Replaces four keys with one mapping, ``rope_parameters``; yields faults, such as keys that disagree."""
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        part = values.pop(name, None) or {}
        part = part if isinstance(part, dict) else {name: part}
        part = {key: value for key, value in part.items() if value is not None}
        if "type" in part:
            part = {"rope_type": part["type"], **part}  # transformers 4 had both names
        for key, value in part.items():
            key = "rope_type" if key == "type" else key
            if rope.setdefault(key, value) != value:
                both = f"{_shown(rope[key])} and, in {name}, {_shown(value)}"
                yield f"model: {key} of rotary embeddings is {both}; keep one, in rope_parameters"
    kind = rope.setdefault("rope_type", "default")
    if kind not in list(config_keys.ROPE_KEYS):
        yield f"model: rope_parameters: rope_type is {_shown(kind)}, expected one of {', '.join(config_keys.ROPE_KEYS)}"
        return
    required, optional = config_keys.ROPE_KEYS[kind]
    # transformers also accepts this key outside of rope_parameters, and ignores it for rope types that do not have it
    original = values.pop(_ORIGINAL, None)
    if original is not None and _ORIGINAL in optional and rope.setdefault(_ORIGINAL, original) != original:
        yield f"model: {_ORIGINAL} is {original}, and in rope_parameters {rope[_ORIGINAL]}; keep one of them"
    for key in required:
        if key not in rope:
            yield f"model: rope_parameters: {key} is missing; the rope_type {kind} needs it"
    for key, value in rope.items():
        if key not in ("rope_type", "rope_theta", "partial_rotary_factor", *required, *optional):
            yield f"model: rope_parameters: {key} is not a key of the rope_type {kind}; leave it out"
        elif (allowed := config_keys.ROPE_VALUES.get(key)) and not allowed.accepts(value):
            yield f"model: rope_parameters: {key} is {_shown(value)}, expected {allowed.expected}"
    rope.pop("partial_rotary_factor", None)
    values["rope_parameters"] = rope


def _shape_faults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yields faults of sizes that are valid by themselves but do not fit together."""
    size = {**defaults, **values}
    hidden = size["hidden_size"]
    heads = size["num_attention_heads"]
    vocabulary = size["vocab_size"]
    shared: int = size["num_key_value_heads"] or heads
    head: int = size.get("head_dim") or hidden // heads
    if hidden % heads:
        yield f"model: hidden_size is {hidden}, expected a multiple of num_attention_heads {heads}"
    elif head % 2:
        yield f"model: head_dim is {head}, expected an even number, since rotary embeddings rotate pairs"
    layers = size["num_hidden_layers"]
    types = values.get("layer_types")
    if types is not None and len(types) != layers:
        yield f"model: layer_types has {len(types)} entries, but num_hidden_layers is {layers}; set layer_types to null"
    if heads % shared:
        yield f"model: num_key_value_heads is {shared}, expected a divisor of num_attention_heads {heads}"
    for key in ("short_factor", "long_factor"):
        factors = values.get("rope_parameters", {}).get(key)
        if isinstance(factors, list) and len(factors) != head // 2:
            yield f"model: rope_parameters: {key} has {len(factors)} numbers, expected {head // 2}, half of head_dim"
    layer = hidden * (2 * head * (heads + shared) + 3 * size["intermediate_size"])
    parameters = layers * layer + hidden * vocabulary
    if parameters > LARGEST_MODEL:
        yield f"model: it would have {parameters:,} parameters, expected at most {LARGEST_MODEL:,}; lower its sizes"
    padding = size["pad_token_id"]
    if padding is not None and padding >= vocabulary:
        yield f"model: pad_token_id is {padding}, expected less than vocab_size {vocabulary}, or null"


def length_of_documents(model_config: PreTrainedConfig) -> int | None:
    """The longest sequence in which each document has its own positions; None means ``max_position_embeddings``.

    Rotary embeddings of the type longrope switch to other frequencies if the longest document of a batch is longer.
    """
    rope: dict[str, Any] = getattr(model_config, "rope_parameters", None) or {}
    return rope[_ORIGINAL] if rope.get("rope_type") == "longrope" else None


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
            f"{_ORIGINAL} ({longest}), beyond which the longest document decides longrope's frequencies for its batch; "
            "shorten it, or pack documents without a mask"
        )
    if fault is not None:
        raise ConfigError([f"data.sequence_length: {sequence_length} is more than {fault}"], source)


def plain_model_config(model_config: PreTrainedConfig) -> dict[str, Any]:
    """The model's settings without the keys that transformers adds about itself."""
    about_itself = ("transformers_version", "_name_or_path", "architectures", "dtype")
    values = json.loads(model_config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in about_itself}
