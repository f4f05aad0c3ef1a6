"""Builds a layer of any kind in each of its forms."""

import copy

import torch
from torch import nn

from relora_mora.adapters.inject import layer_class
from relora_mora.adapters.layers import AdapterLinear
from relora_mora.config.schema import MethodConfig


def layers_of(
    kind: str, inputs: int, outputs: int, size: int, dtype: torch.dtype
) -> tuple[AdapterLinear, AdapterLinear]:
    """The same layer, merged and decoupled; ``kind`` is "lora" or the number of an operator."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    linear.weight.requires_grad_(False)
    if kind == "lora":
        method = MethodConfig(name="lora", rank=3, lora_alpha=6.0, form="merged")
    else:
        method = MethodConfig(name="mora", square_size=size, operators=[int(kind)], form="merged")
    layer = layer_class(method)(linear, method, torch.Generator().manual_seed(1))
    for name in layer.adapter_names:
        nn.init.normal_(layer.get_parameter(name), std=0.3)
    other = copy.deepcopy(layer)
    other.form = "decoupled"
    return layer, other


def made_resident(layer: AdapterLinear) -> AdapterLinear:
    layer.form = "resident"
    layer.resident = True
    layer.keep_merged()
    return layer
