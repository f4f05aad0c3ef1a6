"""A model without its adapters: plain linears, whose weights are ``W + delta``."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from relora_mora.adapters.layers import adapter_layers, adapter_parameters, all_names
from relora_mora.adapters.scope import without_scopes
from relora_mora.engine.protocol import Engine
from relora_mora.library.masters import LoopMasters


def is_sharded(engine: Engine) -> bool:
    """Whether there are parameters that a rank has only in part."""
    return not all(engine.is_whole(name) for name, _ in engine.lm.named_parameters())


def merged_values(held: Mapping[str, Tensor], engine: Engine, masters: LoopMasters) -> dict[str, Any]:
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
    gone = {key for key, value in held.items() if names.get(id(value), key) in adapters}
    gone |= {f"{key.rpartition('.')[0]}._extra_state" for key in gone}  # the operator in use
    missing = dict.fromkeys(layers)
    result: dict[str, Any] = {}
    for key, value in held.items():
        if key in gone:
            continue
        weight = names.get(id(value), key)
        value = engine.read_weight(weight) if weight in engine.shapes else value
        if weight in layers:
            name, layer = layers[weight]
            missing.pop(weight, None)
            values = [engine.gather(f"{name}.{parameter}") for parameter in layer.adapter_names]
            value = (masters.exact(weight, engine) + layer.delta_of(*values)).to(value.dtype)
        if not isinstance(value, Tensor):  # the extra state of a module
            result[key] = copy.deepcopy(value)
        elif not sharded:
            result[key] = value.detach().clone()
        elif engine.rank == 0:
            result[key] = value.detach().cpu()
    if missing:
        raise ValueError(f"the model's state_dict() lacks {len(missing)} weights with adapters ({next(iter(missing))})")
    return result


def plain_copy(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a whole model with plain linears and with the values of :func:`merged_values`."""
    saves = vars(model).get("save_pretrained", object())  # that of attach(), which has the masters
    plain = copy.deepcopy(model, {id(saves): False})
    without_scopes(plain)
    vars(plain).pop("save_pretrained", None)
    if "_original_forward" in vars(plain):
        del plain.forward  # accelerate's, which calls the model that was copied
    places = all_names(plain)
    for _, layer in list(adapter_layers(plain)):
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        linear = nn.utils.skip_init(nn.Linear, *sizes, **like).train(layer.training)
        if layer.bias is not None:
            linear.bias.requires_grad_(layer.bias.requires_grad)
        for place in places[layer]:
            plain.set_submodule(place, linear)
    plain.load_state_dict(state)
    return plain
