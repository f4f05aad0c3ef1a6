"""A model without its adapters: plain linears, whose weights are ``W + delta``."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from relora_mora.adapters.layers import adapter_layers, adapter_parameters
from relora_mora.adapters.mora import MoRALinear
from relora_mora.library.masters import LoopEngine, LoopMasters


def is_sharded(engine: LoopEngine) -> bool:
    """Whether there are parameters that a rank has only in part."""
    return not all(engine.is_whole(name) for name, _ in engine.lm.named_parameters())


def merged_values(held: Mapping[str, Tensor], engine: LoopEngine, masters: LoopMasters) -> dict[str, Tensor]:
    """The state of the engine's model with ``W + delta`` as its weights, rounded once; a collective.

    ``held`` is the ``state_dict(keep_vars=True)`` of the model, taken before ``engine`` was made: it makes FSDP2 shard
    what is whole. If the model is sharded, only the first rank gets values, in host memory.
    """
    lm = engine.lm
    # a key differs from the name if a parameter is tied, or in a wrapper such as torch's for checkpointing
    names = {id(parameter): name for name, parameter in lm.named_parameters()}
    layers = {f"{name}.weight": (name, layer) for name, layer in adapter_layers(lm)}
    adapters = adapter_parameters(lm)
    sharded = is_sharded(engine)
    result: dict[str, Tensor] = {}
    for key, value in held.items():
        weight = names.get(id(value), key)
        if weight in adapters:
            continue
        value = engine.read_weight(weight) if weight in engine.shapes else value
        if weight in layers:
            name, layer = layers.pop(weight)
            values = [engine.gather(f"{name}.{parameter}") for parameter in layer.adapter_names]
            value = (masters.exact(weight, engine) + layer.delta_of(*values)).to(value.dtype)
        if not sharded:
            result[key] = value.detach().clone()
        elif engine.rank == 0:
            result[key] = value.detach().cpu()
    if layers:
        raise ValueError(f"the model's state_dict() lacks {len(layers)} weights with adapters ({next(iter(layers))})")
    return result


def plain_copy(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a whole model with plain linears and with the values of :func:`merged_values`."""
    for _, layer in adapter_layers(model):
        if isinstance(layer, MoRALinear):
            layer.shared_input.pending = None  # tensors of the last forward cannot be copied
    plain = copy.deepcopy(model)
    if "_original_forward" in vars(plain):
        del plain.forward  # accelerate's, which calls the model that was copied
    for name, layer in list(adapter_layers(plain)):
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        linear = nn.utils.skip_init(nn.Linear, *sizes, **like).train(layer.training)
        if layer.bias is not None:
            linear.bias.requires_grad_(layer.bias.requires_grad)
        plain.set_submodule(name, linear)
    plain.load_state_dict(state)
    return plain
