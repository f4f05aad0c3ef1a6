"""Reads, checks and compares configs of the LLaMA family, and the shapes that follow from them.

The rule for each key is in ``config_keys``.
"""

from __future__ import annotations

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
from relora_mora.model.config_keys import (
    ALIAS,
    ARCHITECTURES,
    EXPORT,
    FUNCTION,
    NOTHING,
    ONLY,
    ROPE_KEYS,
    ROPE_VALUES,
    TRAINING,
    Architecture,
)


def head_width(model_config: PreTrainedConfig) -> int:
    """Features of a head of attention."""
    width: int = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
    return width


def attention_widths(model_config: PreTrainedConfig) -> tuple[int, int]:
    """Features of all queries, and of all keys (the values have as many), of one token."""
    heads = model_config.num_attention_heads
    shared_heads = model_config.num_key_value_heads or heads
    return heads * head_width(model_config), shared_heads * head_width(model_config)


def linear_shapes(model_config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear of a decoder layer, by its name."""
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


LARGEST_FILE = 16 * 2**20  # bytes; a config has a few thousand
LARGEST_MODEL = 2**42  # parameters
_ORIGINAL = "original_max_position_embeddings"
_STRETCHED = ("dynamic", "yarn", "longrope")  # what they compute may depend on max_position_embeddings


def read_model_config(settings: ModelConfig) -> PreTrainedConfig:
    """The config in the JSON file ``model.config`` with the overrides applied.

    Raises :class:`ConfigError` with every fault: unreadable file, not JSON, keys that are unknown, values that a key
    may not have or that do not fit together.
    """
    assert settings.config is not None
    path = Path(settings.config)
    return parse_model_config(read_json(path, "model.config") | settings.overrides, str(path))


def read_json(path: Path, setting: str) -> dict[str, Any]:
    """The keys in a config.json; raises :class:`ConfigError` with the name of the setting where it is none."""
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE:,} bytes")
        values = json.loads(content)
    except OSError as error:
        fault = f"{setting}: cannot read it ({error.strerror}); give a file such as configs/model/llama_130m.json"
        raise ConfigError([fault + relative_to(path)], str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{setting}: not JSON ({error}); give the config.json of a LLaMA"], str(path)) from error
    if not isinstance(values, dict):
        fault = f"{setting}: holds a {type(values).__name__}, expected keys such as those of a LlamaConfig"
        raise ConfigError([fault], str(path))
    return values


def architecture_of(values: Mapping[str, Any], source: str) -> Architecture:
    """The kind of model that a config's ``model_type`` names; a LLaMA where it has none.

    Raises :class:`ConfigError` for one that is not of the family.
    """
    given = values.get("model_type")
    kind = "llama" if given is None else given
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        fault = (
            f"model: model_type is {_shown(kind)}, expected one of {', '.join(ARCHITECTURES)}: "
            "no other kind of model can be built here"
        )
        raise ConfigError([fault], source)
    return ARCHITECTURES[kind]


def parse_model_config(values: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """The config of these keys, without those that do nothing; raises :class:`ConfigError` with every fault.

    A key whose value is null and that is not known stands for nothing: so an override leaves a key of the file out.
    """
    architecture = architecture_of(values, source)
    keys = architecture.keys
    name = architecture.config_class.__name__
    unknown = [key for key, value in values.items() if key not in keys and value is not None]
    bad = [key for key in values if key in keys and not keys[key].good(values[key])]
    remedy = "set it to null in model.overrides to leave it out"
    found = [f"model: {key} is no key of a {name}; {remedy}" for key in unknown]
    found += [f"model: {key} is {_shown(values[key])}, expected {keys[key].wanted}" for key in bad]
    kept = {key: value for key, value in values.items() if key in keys and _is_kept(keys[key].use, value)}
    if values.get("num_key_value_heads", 0) is None:  # to transformers as many as attention heads, not a default
        kept["num_key_value_heads"] = kept.get("num_attention_heads", _defaults(architecture)["num_attention_heads"])
    if all(keys[key].use not in (FUNCTION, ALIAS, EXPORT) for key in bad):
        found += [*_put_length(kept), *_put_rope(kept), *_shape_faults(kept, _defaults(architecture))]
    if found:
        raise ConfigError(found, source)
    try:
        model_config = _build(architecture, kept)
        rotary = LlamaRotaryEmbedding(config=model_config)  # type: ignore[arg-type]  # the same in the whole family
    except Exception as error:
        raise ConfigError([f"model: {name} refuses it: {' '.join(str(error).split())}"], source) from error
    if not (0 < rotary.inv_freq.min() <= rotary.inv_freq.max() < math.inf and 0 < rotary.attention_scaling < math.inf):
        fault = f"model: rope_parameters: {_shown(kept['rope_parameters'])} give no finite frequencies; correct them"
        raise ConfigError([fault], source)
    if (
        "sliding_attention" in (getattr(model_config, "layer_types", None) or ())
        and model_config.sliding_window is None
    ):
        fault = "model: layer_types has sliding_attention, and there is no window; set layer_types to null, too"
        raise ConfigError([fault], source)
    if model_config.pad_token_id == -1:
        model_config.pad_token_id = None  # as old exports say it; an embedding would take it for the last token
    model_config.use_cache = False
    return model_config


def stored_model_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that a checkpoint's manifest holds, without foreign keys and names of code; raises what transformers
    raises where it makes none."""
    architecture = architecture_of(values, "the manifest")
    uses = {key: architecture.keys[key].use for key in values if key in architecture.keys}
    return _build(architecture, {key: values[key] for key, use in uses.items() if use not in (NOTHING, ONLY)})


def _build(architecture: Architecture, values: Mapping[str, Any]) -> PreTrainedConfig:
    return architecture.config_class(**{key: value for key, value in values.items() if key != "model_type"})


def _is_kept(use: str, value: Any) -> bool:
    """Null is a value of what only an export carries on, and else stands for the default of the config's class."""
    return use == EXPORT or (use in (FUNCTION, TRAINING, ALIAS) and value is not None)


def keys_with(model_config: PreTrainedConfig, *uses: str) -> dict[str, Any]:
    """The keys of a config that have one of these uses, in the form in which two configs can be compared."""
    keys = ARCHITECTURES[model_config.model_type].keys
    values = {key: getattr(model_config, key, None) for key, rule in keys.items() if rule.use in uses}
    rope = values.get("rope_parameters")
    if rope is not None:
        nothing = ("type", "partial_rotary_factor")
        values["rope_parameters"] = {key: rope[key] for key in rope if rope[key] is not None and key not in nothing}
    return values


def function_differences(theirs: PreTrainedConfig, ours: PreTrainedConfig) -> list[tuple[str, Any, Any]]:
    """(key, there, here) for every key that makes two models with the same weights compute something else.

    The number of positions does not, except where rotary embeddings are stretched to it.
    """
    if theirs.model_type != ours.model_type:
        return [("model_type", theirs.model_type, ours.model_type)]
    there = keys_with(theirs, FUNCTION)
    here = keys_with(ours, FUNCTION)
    if here["rope_parameters"]["rope_type"] not in _STRETCHED:
        here["max_position_embeddings"] = there["max_position_embeddings"]
    return [(key, there[key], here[key]) for key in here if there[key] != here[key]]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _put_length(values: dict[str, Any]) -> Iterator[str]:
    """One name for the number of positions."""
    length = values.pop("max_sequence_length", None)
    if length is not None and values.setdefault("max_position_embeddings", length) != length:
        other = values["max_position_embeddings"]
        yield (
            f"model: max_sequence_length is {length} and max_position_embeddings {other}, which mean the same; "
            "set one of them to null"
        )


def _put_rope(values: dict[str, Any]) -> Iterator[str]:
    """One mapping, ``rope_parameters``, in place of four keys, which must not contradict each other."""
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        given = values.pop(name, None) or {}
        given = given if isinstance(given, dict) else {name: given}
        given = {key: value for key, value in given.items() if value is not None}
        if "type" in given:
            given = {"rope_type": given["type"], **given}  # transformers 4 had both names
        for key, value in given.items():
            key = "rope_type" if key == "type" else key
            if rope.setdefault(key, value) != value:
                both = f"{_shown(rope[key])} and, in {name}, {_shown(value)}"
                yield f"model: {key} of rotary embeddings is {both}; keep one, in rope_parameters"
    kind = rope.setdefault("rope_type", "default")
    if kind not in list(ROPE_KEYS):
        yield f"model: rope_parameters: rope_type is {_shown(kind)}, expected one of {', '.join(ROPE_KEYS)}"
        return
    required, optional = ROPE_KEYS[kind]
    original = values.pop(_ORIGINAL, None)  # transformers reads it outside, too, and for the other kinds nowhere
    if original is not None and _ORIGINAL in optional and rope.setdefault(_ORIGINAL, original) != original:
        yield f"model: {_ORIGINAL} is {original}, and in rope_parameters {rope[_ORIGINAL]}; keep one of them"
    for key in required:
        if key not in rope:
            yield f"model: rope_parameters: {key} is missing; the rope_type {kind} needs it"
    for key in rope:
        if key not in ("rope_type", "rope_theta", "partial_rotary_factor", *required, *optional):
            yield f"model: rope_parameters: {key} is no key of the rope_type {kind}; leave it out"
        elif key in ROPE_VALUES and not ROPE_VALUES[key].good(rope[key]):
            yield f"model: rope_parameters: {key} is {_shown(rope[key])}, expected {ROPE_VALUES[key].wanted}"
    rope.pop("partial_rotary_factor", None)
    values["rope_parameters"] = rope


def _defaults(architecture: Architecture) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(architecture.config_class)}


def _shape_faults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Sizes that are good each for itself and not together."""
    size = {**defaults, **values}
    hidden = size["hidden_size"]
    heads = size["num_attention_heads"]
    vocabulary = size["vocab_size"]
    shared: int = size["num_key_value_heads"] or heads
    head: int = size.get("head_dim") or hidden // heads
    if hidden % heads:
        yield f"model: hidden_size is {hidden}, expected a multiple of num_attention_heads {heads}"
    elif head % 2:
        yield f"model: head_dim is {head}, expected an even number, as rotary embeddings turn pairs"
    layers = size["num_hidden_layers"]
    types = values.get("layer_types")
    if types is not None and len(types) != layers:
        yield f"model: layer_types has {len(types)} entries, and num_hidden_layers is {layers}; set layer_types to null"
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


def attention_window(model_config: PreTrainedConfig) -> int | None:
    """How many positions the layers see that see fewest; None: every one before."""
    layers = getattr(model_config, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        return None
    window: int | None = getattr(model_config, "sliding_window", None)
    return window


def length_of_documents(model_config: PreTrainedConfig) -> int | None:
    """How long sequences may be in which each document has its own positions; None: as long as the model's.

    Rotary embeddings of the kind longrope turn at other frequencies where the longest document of a batch is longer.
    """
    rope: dict[str, Any] = getattr(model_config, "rope_parameters", None) or {}
    return rope[_ORIGINAL] if rope.get("rope_type") == "longrope" else None


def check_length(
    model_config: PreTrainedConfig, sequence_length: int, source: str, *, documents_alone: bool = False
) -> None:
    """Raises :class:`ConfigError` when sequences are longer than the model's positions, or than what its attention
    sees; ``source``: its config file. ``documents_alone``: each document in a sequence has its own positions."""
    positions = model_config.max_position_embeddings
    window = attention_window(model_config)
    if sequence_length > positions:
        fault = (
            f"data.sequence_length: {sequence_length} is more than the model's max_position_embeddings "
            f"({positions}); shorten it or set model.overrides.max_position_embeddings"
        )
        raise ConfigError([fault], source)
    if window is not None and sequence_length > window:
        fault = (
            f"data.sequence_length: {sequence_length} is more than the model's sliding_window ({window}), "
            "and attention here sees every position before it; shorten it"
        )
        raise ConfigError([fault], source)
    longest = length_of_documents(model_config) if documents_alone else None
    if longest is not None and sequence_length > longest:
        fault = (
            f"data.sequence_length: {sequence_length} is more than {_ORIGINAL} ({longest}), and behind that longrope "
            "turns the documents of a batch by the longest of them; shorten it, or pack documents without a mask"
        )
        raise ConfigError([fault], source)


def plain_model_config(model_config: PreTrainedConfig) -> dict[str, Any]:
    """The model's settings without what transformers adds about itself."""
    values = json.loads(model_config.to_json_string(use_diff=False))
    return {
        key: value
        for key, value in values.items()
        if key not in ("transformers_version", "_name_or_path", "architectures", "dtype")
    }
