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
from typing import Literal, TypeVar

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
from relora_mora.config.schema import MethodConfig
from relora_mora.model.causal import ends_of
from relora_mora.weights.foreign import abbreviate, has_weights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
RELEASED_TYPES = (1, 2, 3, 4, 6)  # of kongds/MoRA
KEY = "base_weight"
_SAMPLES = 32
_TOLERANCE = 2**-8  # relative: a model saved in bf16 or fp16 counts as the same
_SMALLEST = 1e-6  # absolute: fp16 has no finer steps near zero
# keys of PEFT's LoraConfig on an adapter's origin and training, and facts that its tensors show
_IGNORED_KEYS = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "lora_dropout", "ensure_weight_tying", "qalora_group_size", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of an init_lora_weights
}
T = TypeVar("T")
_ROUNDING = 2.0  # largest rounding of R
_REMEDY = "save the model with the adapter merged in, and give that"


class _Settings(BaseModel):
    """The keys of ``adapter_config.json`` that decide what an adapter computes. Others must be in ``_IGNORED_KEYS``."""

    model_config = ConfigDict(extra="allow")
    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    r: FiniteFloat | None = None
    rank_pattern: dict[str, FiniteFloat] | None = None
    lora_alpha: FiniteFloat = 8
    alpha_pattern: dict[str, FiniteFloat] | None = None
    use_rslora: bool = False
    use_mora: bool = False
    mora_type: Literal[1, 2, 3, 4, 6] | None = 1
    bias: Literal["none"] = "none"
    # other values, such as pissa and olora, also change the weights of the model
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal", "eva"] = True

    @staticmethod
    def read(path: Path) -> "_Settings":
        """Raises :class:`CheckpointError` if the adapter does not compute ``(W + delta) x``."""
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


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter without the weights of its model. The model's config.json may be there."""
    return (path / CONFIG).exists() and not has_weights(path)


class AdapterFolder:
    """An adapter in a folder. Its tensors have the names of a run's parameters.

    ``shapes`` has all of them: adapters (``...q_proj.lora_A``, ``...q_proj.mora_M``) and modules that trained as a
    whole (``lm_head.weight``). ``mora_type`` is None for LoRA. ``layers`` has the r or R of each layer, and ``alphas``
    the alpha of a LoRA: its delta is ``alpha / r`` times B A. Only JSON and safetensors are read. Raises
    :class:`CheckpointError` if the folder has no adapter, or one that does not compute ``(W + delta) x``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / WEIGHTS
        settings = _Settings.read(folder / CONFIG)
        self.base = settings.base_model_name_or_path
        self.mora_type = settings.mora_type if settings.use_mora else None
        try:
            with safe_open(self.file, framework="pt") as file:
                self._noted = (file.metadata() or {}).get(KEY)
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            reason = "No such file" if isinstance(error, FileNotFoundError) else str(error)
            raise CheckpointError(f"{self.file}: cannot be read ({reason}); save the adapter as safetensors") from error
        self._tensors = self._named(stored)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.layers = self._sizes()
        try:
            self._ranks = {layer: _layer_value(settings.rank_pattern, layer, settings.r) for layer in self.layers}
            self.alphas = {
                layer: _layer_value(settings.alpha_pattern, layer, settings.lora_alpha)
                * (math.sqrt(size) if settings.use_rslora else 1)
                for layer, size in self.layers.items()
            }
        except (re.error, OverflowError) as error:
            fault = f"a key of rank_pattern or alpha_pattern is not a regular expression ({error})"
            raise CheckpointError(f"{folder / CONFIG}: {fault}; {_REMEDY}") from error

    def _named(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file by the names of a run's parameters."""
        tensors: dict[str, Tensor] = {}
        unknown = []
        for key, tensor in stored.items():
            name = key.removeprefix(PREFIX)
            layer, factor, part = name.rpartition(".lora_")
            if name == key or not tensor.is_floating_point():
                unknown.append(key)
            elif part in ("A.weight", "B.weight") and self.mora_type is None:
                tensors[f"{layer}{factor}{part[0]}"] = tensor
            elif part in ("A.weight", "B.weight"):
                if part[0] == "A":  # B is a copy
                    tensors[f"{layer}.mora_M"] = tensor
            elif factor or "base_layer" in name:
                unknown.append(key)
            else:
                tensors[name] = tensor
        if unknown:
            raise CheckpointError(f"{self.file}: {abbreviate(unknown)}: not a tensor of LoRA or MoRA; {_REMEDY}")
        return tensors

    def _sizes(self) -> dict[str, int]:
        """The rank r of LoRA, or the size R of MoRA, of each layer with an adapter."""
        even = self.mora_type is not None and OPERATORS[self.mora_type].even_size
        factors = ("lora_A", "lora_B") if self.mora_type is None else ("mora_M",)
        layers: dict[str, int] = {}
        for name in self.shapes:
            layer, _, part = name.rpartition(".")
            if part in factors:
                first, last = (self.shapes.get(f"{layer}.{each}", ()) for each in (factors[0], factors[-1]))
                fits = len(first) == len(last) == 2 and first[0] == last[1] > 0
                if not fits or (even and first[0] % 2):
                    expected = "A [r, in] and B [out, r]" if self.mora_type is None else "M [R, R]"
                    expected += " with an even R" if even else ""
                    fault = f"{layer} has {list(first)} and {list(last)}, expected {expected}"
                    raise CheckpointError(f"{self.file}: {fault}; save it again")
                layers[layer] = first[0]
        if not layers:
            raise CheckpointError(f"{self.file}: no layer has an adapter; save it again")
        return layers

    def plain(self) -> Iterator[str]:
        """Names of the parameters that are not adapters."""
        return (name for name in self.shapes if name.endswith((".weight", ".bias")))

    def value(self, name: str) -> Tensor:
        """A tensor in float32, by a name of ``shapes``. Raises :class:`CheckpointError` if it is not finite."""
        value = self._tensors[name].float()
        if not value.isfinite().all():
            raise CheckpointError(f"{self.file}: {name} holds numbers that are not finite; use another adapter")
        return value

    def check_base(self, weight_of: Callable[[str], Tensor | None], base: str) -> None:
        """Raises :class:`CheckpointError` if a model has other weights than the one that the adapter was trained on.

        Only adapters that this package has written identify their base.
        """
        if self._noted is not None and is_other_base(self._noted, weight_of):
            same = "it has changed since"
            remedy = same if base == self.base else f"give the model that it was trained on ({self.base})"
            raise CheckpointError(f"{self.file}: was trained on other weights than {base} has; {remedy}")

    def check_head(self, model: PreTrainedModel) -> None:
        """Raises :class:`CheckpointError` if it changes tied embeddings, since PEFT changes only one of their uses."""
        names = ends_of(model)
        changed = any(name in self.shapes or name.removesuffix(".weight") in self.layers for name in names)
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight and changed:
            raise CheckpointError(
                f"{self.file}: changes the embeddings or the head of a model that ties them, so it is more than an "
                f"adapter; {_REMEDY}"
            )

    def layer_on(self, name: str, linear: nn.Linear) -> AdapterLinear:
        """The adapter layer for a linear, without values. Call it on the meta device."""
        generator = layer_generator(0, name, 0)
        if self.mora_type is not None:
            return MoRALinear(linear, MethodConfig(square_size=self.layers[name]), generator, self.mora_type)
        # a file may have any alpha
        return LoRALinear(
            linear, MethodConfig.model_construct(rank=self.layers[name], lora_alpha=self.alphas[name]), generator
        )

    @torch.no_grad()
    def merge_into(self, model: PreTrainedModel, named: str) -> None:
        """Adds every delta to its weight, in place, and replaces the modules that trained as a whole.

        ``model`` is in float32; errors call it ``named``. Raises :class:`CheckpointError` if the adapter belongs to
        another model; the model may then be partly changed.
        """
        self.check_head(model)
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        self.check_base(parameters.get, named)
        for name, size in self.layers.items():
            linear = modules.get(name)
            if not isinstance(linear, nn.Linear):
                raise self._of_another_model(f"{name} is not a linear layer of {named}")
            rank = self._ranks[name]
            widths = linear.in_features + linear.out_features
            if self.mora_type is not None and rank and abs(math.sqrt(widths * rank) - size) > _ROUNDING:
                raise self._of_another_model(f"{name} has an M of size {size}, which does not fit the layer of {named}")
            with torch.device("meta"):
                layer = self.layer_on(name, linear)
            names = [f"{name}.{key}" for key in layer.adapter_names]
            for each in names:
                self._check_shape(each, layer.get_parameter(each.rpartition(".")[2]), named)
            linear.weight += layer.delta_of(*map(self.value, names))
        for name in self.plain():
            self._check_shape(name, parameters.get(name), named)
            parameters[name].copy_(self.value(name))

    def _check_shape(self, name: str, expected: Tensor | None, named: str) -> None:
        shape = None if expected is None else tuple(expected.shape)
        if self.shapes[name] != shape:
            theirs = "nothing of that name" if shape is None else list(shape)
            raise self._of_another_model(f"{name} is {list(self.shapes[name])}, and {named} has {theirs}")

    def _of_another_model(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {fault}; give the model that the adapter was trained on")


def _layer_value(pattern: Mapping[str, float] | None, layer: str, default: T) -> float | T:
    """The value for a layer: that of the first key that matches it by ``peft.utils.other.get_pattern_key``."""
    matching = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(matching, default)


def base_sample(name: str, weight: Tensor) -> str:
    """A sample that identifies a base model, as JSON: a weight's name and numbers spread evenly over its elements."""
    return json.dumps({"name": name, "values": _sample(weight).tolist()})


def is_other_base(noted: str, weight_of: Callable[[str], Tensor | None]) -> bool:
    """Whether a sample is from a model with other weights than these. A damaged sample is ignored."""
    try:
        note = json.loads(noted)
        weight, expected = weight_of(note["name"]), torch.tensor(note["values"], dtype=torch.float32)
    except (ValueError, KeyError, TypeError):
        return False
    return weight is None or not torch.allclose(_sample(weight), expected, rtol=_TOLERANCE, atol=_SMALLEST)


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    places = [number * (flat.numel() - 1) // (_SAMPLES - 1) for number in range(_SAMPLES)]
    return flat[places].float().cpu()
