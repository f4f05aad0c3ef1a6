"""The methods: adapter layers, and putting them into a model."""

from relora_mora.methods.inject import Injection, decoder_linears, inject, layer_square_size
from relora_mora.methods.layers import (
    AdapterLinear,
    LoRALinear,
    MoRALinear,
    adapter_layers,
    adapter_parameters,
    layer_generator,
)

__all__ = [
    "AdapterLinear",
    "Injection",
    "LoRALinear",
    "MoRALinear",
    "adapter_layers",
    "adapter_parameters",
    "decoder_linears",
    "inject",
    "layer_generator",
    "layer_square_size",
]
