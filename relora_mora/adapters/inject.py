"""Puts adapter layers into a model that knows nothing about them."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from relora_mora.adapters.layers import AdapterLinear, adapter_layers, all_names, layer_generator
from relora_mora.adapters.scope import Caller
from relora_mora.adapters.stored import PLAIN, EightBits, Stored
from relora_mora.config.schema import MethodConfig


def _is_layer(module: nn.Module) -> bool:
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)  # without transformers


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers with their names: the modules that transformers checkpoints one by one."""
    inside = [(name, m) for name, m in model.named_modules() if _is_layer(m)]
    return [(name, m) for name, m in inside if not any(name.startswith(f"{other}.") for other, _ in inside)]


@torch.no_grad()
def multiplies(module: nn.Linear) -> bool:
    """Whether a linear only computes ``x W^T + b``; a router, for example, does more. Needs no weights."""
    if type(module) is nn.Linear:
        return True
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.shape != (module.out_features, module.in_features):
        return False
    if module._parameters.keys() != {"weight", "bias"} or module._buffers or module._modules:
        return False
    small = copy.copy(module)
    bias = None if module.bias is None else nn.Parameter(torch.rand(5, device="cpu"))
    small._parameters = {"weight": nn.Parameter(torch.rand(5, module.in_features, device="cpu")), "bias": bias}
    x = torch.rand(1, 3, module.in_features, device="cpu")
    try:
        return torch.allclose(small(x), F.linear(x, small.weight, small.bias), rtol=1e-4)
    except Exception:  # a forward that needs more than an input
        return False


def decoder_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear | AdapterLinear]]:
    """Every linear inside the decoder layers that has an adapter or can have one."""
    for layer_name, layer in decoder_layers(model):
        for name, module in layer.named_modules():
            if isinstance(module, AdapterLinear) or (isinstance(module, nn.Linear) and multiplies(module)):
                yield f"{layer_name}.{name}", module


def inject(model: nn.Module, method: MethodConfig, *, seed: int, mora_type: int | None = None) -> None:
    """Replaces the target linears of the decoder with adapter layers in place.

    ``mora_type`` is the first operator (default: the first of the cycle). Raises ValueError if an operator cannot be
    built for a layer's shape. ``check_adapters`` reports targets that match nothing.
    """
    targets = method.target_modules
    names = [
        name
        for name, module in decoder_linears(model)
        if isinstance(module, nn.Linear) and (targets is None or name.rpartition(".")[2] in targets)
    ]
    replace_linears(model, names, method, seed=seed, mora_type=mora_type)


def replace_linears(
    model: nn.Module,
    names: Iterable[str],
    method: MethodConfig,
    *,
    seed: int,
    mora_type: int | None = None,
) -> dict[str, AdapterLinear]:
    """Replaces linears by name with adapter layers in place, and returns these; see :func:`inject`."""
    layer = layer_class(method)
    places = all_names(model)
    replaced: dict[str, AdapterLinear] = {}
    by_parent: dict[str, list[AdapterLinear]] = {}
    for name in names:
        parent_name, _, kind = name.rpartition(".")
        linear: Any = model.get_submodule(name)
        adapter = layer(linear, method.of(kind), layer_generator(seed, name, 0), mora_type)
        assert all(adapter.get_parameter(key).dim() == 2 for key in adapter.adapter_names), "not a matrix"
        assert not [*adapter.buffers()], "a resume restores only parameters"
        replaced[name] = adapter
        by_parent.setdefault(parent_name, []).append(adapter)
    if fault := _size_fault(replaced, method):
        raise ValueError(fault)
    for name, adapter in replaced.items():  # the model does not change before every layer has been built
        adapter.base_weight.requires_grad_(False)
        for place in places[model.get_submodule(name)]:
            model.set_submodule(place, adapter)
    for parent_name, layers in by_parent.items():
        if len(layers) > 1:
            layer.share_input(model.get_submodule(parent_name), layers)
    return replaced


def _size_fault(layers: Mapping[str, AdapterLinear], method: MethodConfig) -> str | None:
    """Why adapters are too large, if they are: larger than their weights, or a square than both widths of a layer."""
    by_size = method.uses_squares and method.square_size is not None
    setting = "square_size" if by_size else "rank_pattern" if method.rank_pattern else "rank"
    for name, layer in layers.items():
        kind, size = name.rpartition(".")[2], getattr(layer, "square_size", 0)
        widths = layer.in_features, layer.out_features
        if (by_size or kind in method.rank_pattern) and size > max(widths):
            return f"method.{setting}: R of {size} is larger than both widths of {kind} {widths}; lower it"
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    adapters = sum(layer.get_parameter(key).numel() for layer in layers.values() for key in layer.adapter_names)
    if adapters <= weights:
        return None
    return (
        f"method.{setting}: the adapters have {adapters:,} parameters, more than the {weights:,} of their weights; "
        "lower it, or train all weights (method.name=full)"
    )


def watch_callers(model: nn.Module) -> None:
    """Lets code of the model read the weights of adapter layers during a forward; see :attr:`AdapterLinear.weight`."""
    names = all_names(model)
    callers: dict[nn.Module, Caller] = {}
    for first_name, layer in adapter_layers(model):
        layer.name = first_name
        for name in names[layer]:
            while name:  # from the inside to the whole model, whose name is empty
                name = name.rpartition(".")[0]
                module = model.get_submodule(name)
                if module not in callers:
                    callers[module] = Caller(module)
                layer.callers += (callers[module],)


def choose_storage(model: nn.Module, method: MethodConfig, *, on_gpu: bool) -> None:
    """Decides how the weights under adapters are stored; they change when :meth:`AdapterLinear.pack` is called."""
    for _, layer in adapter_layers(model):
        layer.stored = storage_of(layer, method, on_gpu=on_gpu)


def storage_of(layer: AdapterLinear, method: MethodConfig, *, on_gpu: bool) -> Stored:
    """How ``method.base`` stores the weight of a layer."""
    if method.eight_bits is None:
        return PLAIN
    assert method.base_products != "auto", "it depends on the machine; see stored.with_products"
    return EightBits(
        method.eight_bits,
        layer.out_features,
        layer.in_features,
        multiplies=method.base_products,
        on_gpu=on_gpu,
    )


def layer_class(method: MethodConfig) -> type[AdapterLinear]:
    """The class of the method's adapter layers; only for methods that have an adapter."""
    assert method.record.adapter is not None
    layer: type[AdapterLinear] = resolve_name(method.record.adapter.layer)
    return layer
