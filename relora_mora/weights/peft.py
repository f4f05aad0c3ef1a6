"""A folder that holds an adapter, as PEFT writes it.

::

    adapter_config.json          which adapter, its scale, the model it belongs to
    adapter_model.safetensors    A [r, in] and B [out, r] of each layer, and whole modules that trained next to them

A key is ``base_model.model.`` and the tensor's name in the model: ``...layers.0.self_attn.q_proj.lora_A.weight``. The
released MoRA (kongds/MoRA, its ``peft-mora``) says ``use_mora`` and ``mora_type``, keeps M [R, R] under ``lora_A`` and
the same once more under ``lora_B``; its scale is 1. The file's header names the base model by some numbers of one of
its weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora_mora.adapters.layers import AdapterLinear, layer_generator
from relora_mora.adapters.lora import LoRALinear
from relora_mora.adapters.mora import MoRALinear
from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.config.registry import OPERATORS
from relora_mora.weights.foreign import has_weights, in_short

KEY = "base_weight"
_SAMPLES = 32
_TOLERANCE = 2**-8  # of each: a model saved in bf16 or fp16 is the same
_SMALLEST = 1e-6  # fp16 has no finer steps near zero


def note_of(name: str, weight: Tensor) -> str:
    """What a file keeps of a model: the weight's name and numbers of it, evenly over its elements."""
    return json.dumps({"name": name, "values": _sample(weight).tolist()})


def is_of_another(noted: str, weight_of: Callable[[str], Tensor | None]) -> bool:
    """Whether a note is that of another model than one with these weights. A note that is damaged says nothing."""
    try:
        note = json.loads(noted)
        expected = torch.tensor(note["values"], dtype=torch.float32)
        weight = weight_of(note["name"]) if isinstance(note, Mapping) else None
    except (ValueError, KeyError, TypeError):
        return False
    found = None if weight is None else _sample(weight)
    return found is None or not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_SMALLEST)


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    places = [number * (flat.numel() - 1) // (_SAMPLES - 1) for number in range(_SAMPLES)]
    return flat[places].float().cpu()


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
RELEASED_TYPES = (1, 2, 3, 4, 6)  # of kongds/MoRA

# of PEFT's LoraConfig: where an adapter comes from, how it was trained, and what the tensors themselves say
_SAYS_NOTHING = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "lora_dropout", "ensure_weight_tying", "qalora_group_size", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of an init_lora_weights
}
T = TypeVar("T")
_ROUNDING = 2.0  # of R
_FLOATS = ("F64", "F32", "F16", "BF16")
_REMEDY = "save the model with the adapter merged in, and give that"


class _Settings(BaseModel):
    """What of ``adapter_config.json`` decides what an adapter computes. Any other key must be one that says nothing."""

    model_config = ConfigDict(extra="allow")
    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    r: FiniteFloat | None = None
    rank_pattern: dict[str, FiniteFloat] = {}
    lora_alpha: FiniteFloat = 8
    alpha_pattern: dict[str, FiniteFloat] = {}
    use_rslora: bool = False
    use_mora: bool = False
    mora_type: int = 1
    bias: Literal["none"] = "none"
    # the others, such as pissa and olora, change the weights of the model as well
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal", "eva"] = True


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter without the weights of its model, whose config.json may be there."""
    return (path / CONFIG).exists() and not has_weights(path)


class AdapterFolder:
    """An adapter in a folder; its tensors have the names that the parameters of a run have.

    ``shapes`` has them all: those of the layers with adapters (``...q_proj.lora_A``, ``...q_proj.mora_M``), and those
    of modules that trained as a whole (``lm_head.weight``). ``mora_type`` is None for LoRA. Nothing but JSON and
    safetensors is read. Raises :class:`CheckpointError` for what is no adapter, and for one that computes something
    else than ``(W + delta) x``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / WEIGHTS
        self._settings = self._read_settings()
        self.base = self._settings.base_model_name_or_path
        self.mora_type = self._settings.mora_type if self._settings.use_mora else None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._keys: dict[str, str] = {}
        self._copies: dict[str, str] = {}  # of M
        try:
            self._tensors: Any = safe_open(self.file, framework="pt")
        except (SafetensorError, OSError) as error:
            said = "No such file" if isinstance(error, FileNotFoundError) else str(error)
            raise CheckpointError(f"{self.file}: cannot be read ({said}); save the adapter as safetensors") from error
        self._index()
        self.layers = self._check_layers()

    def _read_settings(self) -> _Settings:
        path = self.folder / CONFIG
        given = {key: value for key, value in _read_json(path).items() if value is not None}
        try:
            settings = _Settings.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][:1])
            raise CheckpointError(f"{path}: {where} is {given.get(where)!r}: {first['msg']}; {_REMEDY}") from error
        others = [key for key, value in (settings.model_extra or {}).items() if value and key not in _SAYS_NOTHING]
        if others:
            raise CheckpointError(f"{path}: {', '.join(others)}: not supported here; {_REMEDY}")
        if settings.use_mora and settings.mora_type not in RELEASED_TYPES:
            known = ", ".join(map(str, RELEASED_TYPES))
            raise CheckpointError(f"{path}: mora_type is {settings.mora_type}, expected one of {known}; {_REMEDY}")
        for pattern in ("alpha_pattern", "rank_pattern"):
            for key in getattr(settings, pattern):
                try:
                    _matches(key, "")
                except (re.error, OverflowError) as error:
                    raise CheckpointError(
                        f"{path}: {pattern} has {key!r}, which is not a regular expression ({error}); correct it"
                    ) from error
        return settings

    def _index(self) -> None:
        unknown = []
        for key in self._tensors.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            tensor = self._tensors.get_slice(key)
            name = key.removeprefix(PREFIX)
            own = name
            if name.endswith((".lora_A.weight", ".lora_B.weight")):
                own = name.removesuffix(".weight")
                if self.mora_type is not None:
                    own = f"{own.rpartition('.')[0]}.mora_M"
            is_other = "base_layer" in name or (own == name and "lora_" in name)
            if name == key or tensor.get_dtype() not in _FLOATS or is_other:
                unknown.append(key)
            elif own.endswith(".mora_M") and name.endswith(".lora_B.weight"):
                self._copies[own] = key
            else:
                self._keys[own] = key
                self.shapes[own] = tuple(tensor.get_shape())
        if unknown:
            raise CheckpointError(f"{self.file}: {in_short(unknown)}: no tensors of LoRA or MoRA; {_REMEDY}")

    def _check_layers(self) -> dict[str, int]:
        """The rank r, or R, of each layer with an adapter."""
        layers: dict[str, int] = {}
        for name, shape in self.shapes.items():
            layer, _, part = name.rpartition(".")
            if part == "mora_M":
                even = OPERATORS[self.mora_type].even_size if self.mora_type is not None else False
                fits = len(shape) == 2 and shape[0] == shape[1] and not (even and shape[0] % 2)
                found = f"M {list(shape)}, expected [R, R]{' with an even R' if even else ''}"
            elif part in ("lora_A", "lora_B"):
                a = self.shapes.get(f"{layer}.lora_A", ())
                b = self.shapes.get(f"{layer}.lora_B", ())
                fits = len(a) == len(b) == 2 and a[0] == b[1]
                found = f"A {list(a)} and B {list(b)}, expected [r, in] and [out, r]"
            else:
                continue
            if not fits or 0 in shape:
                raise CheckpointError(f"{self.file}: {layer} has {found}; save it again")
            layers[layer] = shape[1] if part == "lora_B" else shape[0]
        if not layers:
            raise CheckpointError(f"{self.file}: no layer has an adapter; save it again")
        return layers

    def check_base(self, weight_of: Callable[[str], Tensor | None], base: str) -> None:
        """Raises :class:`CheckpointError` where a model has other weights than the one that the adapter was made on.

        Adapters that this package has written know that; those of others do not.
        """
        noted = (self._tensors.metadata() or {}).get(KEY)
        if noted is not None and is_of_another(noted, weight_of):
            remedy = (
                "it has changed since" if base == self.base else f"give the model that it was trained on ({self.base})"
            )
            raise CheckpointError(f"{self.file}: was trained on other weights than those of {base}; {remedy}")

    def fits(self, layer: str, in_features: int, out_features: int) -> bool:
        """Whether R of a MoRA layer is what the adapter's rank makes of these sizes, rounded in any way."""
        rank = _of_layer(self._settings.rank_pattern, layer, self._settings.r)
        if self.mora_type is None or rank is None:
            return True
        return abs(math.sqrt((in_features + out_features) * rank) - self.layers[layer]) <= _ROUNDING

    def alpha(self, layer: str) -> float:
        """LoRA's alpha of a layer: delta is ``alpha / r`` times B A."""
        settings = self._settings
        alpha = _of_layer(settings.alpha_pattern, layer, settings.lora_alpha)
        return alpha * math.sqrt(self.layers[layer]) if settings.use_rslora else alpha

    def plain(self) -> Iterator[str]:
        """Names of the parameters that are not adapters."""
        return (name for name in self.shapes if name.endswith((".weight", ".bias")))

    def check_head(self, model: PreTrainedModel) -> None:
        """Raises :class:`CheckpointError` for embeddings that are also the head: PEFT changes one of the two alone."""
        embedding = model.get_input_embeddings().weight
        if model.get_output_embeddings().weight is embedding and (
            "model.embed_tokens.weight" in self.shapes or "lm_head" in self.layers
        ):
            raise CheckpointError(
                f"{self.file}: changes embeddings or head of a model in which they are one, and is not that model's "
                f"adapter alone; {_REMEDY}"
            )

    def value(self, name: str) -> Tensor:
        """A tensor in float32, by a name of ``shapes``. Raises :class:`CheckpointError` where it is not finite."""
        value: Tensor = self._tensors.get_tensor(self._keys[name]).float()
        if not value.isfinite().all():
            raise CheckpointError(f"{self.file}: {name} holds numbers that are not finite; use another adapter")
        copy = self._copies.get(name)
        if copy is not None and not self._tensors.get_tensor(copy).float().equal(value):
            raise CheckpointError(f"{self.file}: {copy} is no copy of M under lora_A; save it again")
        return value

    def layer_on(self, name: str, linear: nn.Linear) -> AdapterLinear:
        """The adapter layer that this adapter makes of a linear, without values; to be called on the meta device."""
        if self.mora_type is not None:
            return MoRALinear(linear, self.layers[name], self.mora_type)
        return LoRALinear(linear, self.layers[name], self.alpha(name), layer_generator(0, name, 0))


def _matches(key: str, layer: str) -> bool:
    """Whether a key of a pattern is for a layer, as ``peft.utils.other.get_pattern_key`` decides it."""
    return re.match(rf"(.*\.)?({key})$", layer) is not None


def _of_layer(pattern: Mapping[str, float], layer: str, default: T) -> float | T:
    """What PEFT takes for a layer: the value of the first key that matches it."""
    return next((value for key, value in pattern.items() if _matches(key, layer)), default)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read ({said}); give a folder as PEFT saves an adapter") from error
    return values
