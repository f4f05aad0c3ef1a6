"""Adapter folders in the format of PEFT.

::

    adapter_config.json          which adapter, its scale, the model it belongs to
    adapter_model.safetensors    A [r, in] and B [out, r] of each layer, and whole modules that trained next to them

A key is ``base_model.model.`` plus the tensor's name in the model: ``...layers.0.self_attn.q_proj.lora_A.weight``. The
released MoRA (kongds/MoRA, its ``peft-mora``) sets ``use_mora`` and ``mora_type``, stores M [R, R] under ``lora_A`` and
a copy under ``lora_B``, and has a scale of 1. The file's header identifies the base model by a sample of numbers from
one of its weights.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora_mora.adapters.layers import AdapterLinear, layer_generator
from relora_mora.adapters.lora import LoRALinear
from relora_mora.adapters.mora import MoRALinear
from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.config.registry import OPERATORS
from relora_mora.config.schema import MethodConfig
from relora_mora.model.causal import ends_of
from relora_mora.weights.foreign import abbreviate, has_weights

KEY = "base_weight"
_SAMPLES = 32
_TOLERANCE = 2**-8  # relative: a model saved in bf16 or fp16 counts as the same
_SMALLEST = 1e-6  # absolute: fp16 has no finer steps near zero


def base_sample(name: str, weight: Tensor) -> str:
    """A sample that identifies a base model, as JSON: a weight's name and numbers spread evenly over its elements."""
    return json.dumps({"name": name, "values": _sample(weight).tolist()})


def is_other_base(noted: str, weight_of: Callable[[str], Tensor | None]) -> bool:
    """Whether a sample is from a model with other weights than these. A damaged sample is ignored."""
    try:
        note = json.loads(noted)
        expected = torch.tensor(note["values"], dtype=torch.float32)
        weight = weight_of(note["name"]) if isinstance(note, Mapping) else None
    except (ValueError, KeyError, TypeError):
        return False
    if weight is None:
        return True
    return not torch.allclose(_sample(weight), expected, rtol=_TOLERANCE, atol=_SMALLEST)


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    places = [number * (flat.numel() - 1) // (_SAMPLES - 1) for number in range(_SAMPLES)]
    return flat[places].float().cpu()


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
RELEASED_TYPES = (1, 2, 3, 4, 6)  # of kongds/MoRA

# keys of PEFT's LoraConfig on an adapter's origin and training, and facts that its tensors show
_IGNORED_KEYS = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "lora_dropout", "ensure_weight_tying", "qalora_group_size", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of an init_lora_weights
}
T = TypeVar("T")
_ROUNDING = 2.0  # largest rounding of R
_FLOATS = ("F64", "F32", "F16", "BF16")
_REMEDY = "save the model with the adapter merged in, and give that"


class _Settings(BaseModel):
    """The keys of ``adapter_config.json`` that decide what an adapter computes. Others must be in ``_IGNORED_KEYS``."""

    model_config = ConfigDict(extra="allow")
    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    r: FiniteFloat | None = None
    rank_pattern: dict[str, FiniteFloat] = {}
    lora_alpha: FiniteFloat = 8
    alpha_pattern: dict[str, FiniteFloat] = {}
    use_rslora: bool = False
    use_mora: bool = False
    mora_type: Literal[1, 2, 3, 4, 6] = 1
    bias: Literal["none"] = "none"
    # other values, such as pissa and olora, also change the weights of the model
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal", "eva"] = True

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _are_expressions(cls, pattern: dict[str, float]) -> dict[str, float]:
        for key in pattern:
            try:
                _matches(key, "")
            except (re.error, OverflowError) as error:
                raise ValueError(f"{key!r} is not a regular expression ({error})") from error
        return pattern


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter without the weights of its model. The model's config.json may be there."""
    return (path / CONFIG).exists() and not has_weights(path)


class AdapterFolder:
    """An adapter in a folder. Its tensors have the names of a run's parameters.

    ``shapes`` has all of them: adapters (``...q_proj.lora_A``, ``...q_proj.mora_M``) and modules that trained as a
    whole (``lm_head.weight``). ``mora_type`` is None for LoRA. Only JSON and safetensors are read. Raises
    :class:`CheckpointError` if the folder has no adapter, or one that does not compute ``(W + delta) x``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / WEIGHTS
        self._settings = self._read_settings()
        self.base = self._settings.base_model_name_or_path
        self.mora_type = self._settings.mora_type if self._settings.use_mora else None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._keys: dict[str, str] = {}
        try:
            self._tensors: Any = safe_open(self.file, framework="pt")
        except (SafetensorError, OSError) as error:
            reason = "No such file" if isinstance(error, FileNotFoundError) else str(error)
            raise CheckpointError(f"{self.file}: cannot be read ({reason}); save the adapter as safetensors") from error
        self._index()
        self.layers = self._check_layers()

    def _read_settings(self) -> _Settings:
        path = self.folder / CONFIG
        try:
            settings = _Settings.model_validate_json(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give a folder of PEFT") from error
        except ValidationError as error:
            first = error.errors()[0]
            given = None if first["type"] == "missing" else first["input"]
            found = f"{first['loc'][0]} is {given!r}" if first["loc"] else "cannot be read"
            raise CheckpointError(f"{path}: {found}: {first['msg']}; {_REMEDY}") from error
        others = [key for key, value in (settings.model_extra or {}).items() if value and key not in _IGNORED_KEYS]
        if others:
            raise CheckpointError(f"{path}: {', '.join(others)}: not supported here; {_REMEDY}")
        return settings

    def _index(self) -> None:
        unknown = []
        for key in self._tensors.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
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
            elif not (own.endswith(".mora_M") and name.endswith(".lora_B.weight")):  # that is the copy of M
                self._keys[own] = key
                self.shapes[own] = tuple(tensor.get_shape())
        if unknown:
            raise CheckpointError(f"{self.file}: {abbreviate(unknown)}: not a tensor of LoRA or MoRA; {_REMEDY}")

    def _check_layers(self) -> dict[str, int]:
        """The rank r of LoRA, or the size R of MoRA, of each layer with an adapter."""
        layers: dict[str, int] = {}
        for name, shape in self.shapes.items():
            layer, _, part = name.rpartition(".")
            if part == "mora_M":
                even = OPERATORS[self.mora_type].even_size if self.mora_type is not None else False
                fits = len(shape) == 2 and shape[0] == shape[1] and not (even and shape[0] % 2)
                shapes = f"M {list(shape)}, expected [R, R]{' with an even R' if even else ''}"
            elif part in ("lora_A", "lora_B"):
                a = self.shapes.get(f"{layer}.lora_A", ())
                b = self.shapes.get(f"{layer}.lora_B", ())
                fits = len(a) == len(b) == 2 and a[0] == b[1]
                shapes = f"A {list(a)} and B {list(b)}, expected [r, in] and [out, r]"
            else:
                continue
            if not fits or 0 in shape:
                raise CheckpointError(f"{self.file}: {layer} has {shapes}; save it again")
            layers[layer] = shape[1] if part == "lora_B" else shape[0]
        if not layers:
            raise CheckpointError(f"{self.file}: no layer has an adapter; save it again")
        return layers

    def check_base(self, weight_of: Callable[[str], Tensor | None], base: str) -> None:
        """Raises :class:`CheckpointError` if a model has other weights than the one that the adapter was trained on.

        Only adapters that this package has written identify their base.
        """
        noted = (self._tensors.metadata() or {}).get(KEY)
        if noted is not None and is_other_base(noted, weight_of):
            remedy = (
                "it has changed since" if base == self.base else f"give the model that it was trained on ({self.base})"
            )
            raise CheckpointError(f"{self.file}: was trained on other weights than {base} has; {remedy}")

    def fits(self, layer: str, in_features: int, out_features: int) -> bool:
        """Whether R of a MoRA layer fits the adapter's rank and these sizes, with any rounding."""
        rank = _layer_value(self._settings.rank_pattern, layer, self._settings.r)
        if self.mora_type is None or rank is None:
            return True
        return abs(math.sqrt((in_features + out_features) * rank) - self.layers[layer]) <= _ROUNDING

    def alpha(self, layer: str) -> float:
        """The alpha of a LoRA layer: delta is ``alpha / r`` times B A."""
        settings = self._settings
        alpha = _layer_value(settings.alpha_pattern, layer, settings.lora_alpha)
        return alpha * math.sqrt(self.layers[layer]) if settings.use_rslora else alpha

    def plain(self) -> Iterator[str]:
        """Names of the parameters that are not adapters."""
        return (name for name in self.shapes if name.endswith((".weight", ".bias")))

    def check_head(self, model: PreTrainedModel) -> None:
        """Raises :class:`CheckpointError` if it changes tied embeddings, since PEFT changes only one of their uses."""
        embedding = model.get_input_embeddings().weight
        names = ends_of(model)
        changed = any(name in self.shapes or name.removesuffix(".weight") in self.layers for name in names)
        if model.get_output_embeddings().weight is embedding and changed:
            raise CheckpointError(
                f"{self.file}: changes the embeddings or the head of a model that ties them, so it is more than an "
                f"adapter; {_REMEDY}"
            )

    def value(self, name: str) -> Tensor:
        """A tensor in float32, by a name of ``shapes``. Raises :class:`CheckpointError` if it is not finite."""
        value: Tensor = self._tensors.get_tensor(self._keys[name]).float()
        if not value.isfinite().all():
            raise CheckpointError(f"{self.file}: {name} holds numbers that are not finite; use another adapter")
        return value

    def layer_on(self, name: str, linear: nn.Linear) -> AdapterLinear:
        """The adapter layer for a linear, without values. Call it on the meta device."""
        size = self.layers[name]
        generator = layer_generator(0, name, 0)
        if self.mora_type is not None:
            return MoRALinear(linear, MethodConfig(square_size=size), generator, self.mora_type)
        method = MethodConfig.model_construct(rank=size, lora_alpha=self.alpha(name))  # a file may have any alpha
        return LoRALinear(linear, method, generator)


def _matches(key: str, layer: str) -> bool:
    """Whether a key of a pattern matches a layer, by the rule of ``peft.utils.other.get_pattern_key``."""
    return re.match(rf"(.*\.)?({key})$", layer) is not None


def _layer_value(pattern: Mapping[str, float], layer: str, default: T) -> float | T:
    """The value for a layer as in PEFT: that of the first key that matches it."""
    return next((value for key, value in pattern.items() if _matches(key, layer)), default)
