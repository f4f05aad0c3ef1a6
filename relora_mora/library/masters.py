"""The exact values of frozen weights in a training loop of one's own, and the model that is merged from them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relora_mora.adapters.layers import adapter_layers, adapter_parameters, all_names
from relora_mora.adapters.scope import without_scopes
from relora_mora.engine.merging import FrozenMasters
from relora_mora.engine.protocol import Engine


class LoopMasters(FrozenMasters):
    """Masters of the weights that are not whole and float32 on every rank. A weight that is so is its own master.

    They are made at the first merge. Until then the weights themselves are exact. ``kept`` has the names of all
    masters, on every rank.
    """

    kept: Sequence[str] = ()

    def prepare(self, engine: Engine) -> None:
        """Called before a merge; a collective. Makes the masters that are missing, and compares the others.

        Raises ValueError if a weight is not its rounded master.
        """
        dtypes = {name: engine.lm.get_parameter(name).dtype for name in self.owner}
        needed = [name for name, dtype in dtypes.items() if dtype != torch.float32 or not engine.is_whole(name)]
        changed = torch.zeros(len(needed), dtype=torch.float64, device=engine.device)
        for index, name in enumerate(needed):
            weight = engine.read_weight(name)
            if self.owner[name] != self.rank:
                continue
            if name in self.kept:
                changed[index] = not torch.equal(self.weights[name].to(weight.device, weight.dtype), weight)
            else:
                self.put(name, weight)
        wrong = [name for name, count in zip(needed, engine.all_reduce(changed).tolist(), strict=True) if count]
        if wrong:
            raise ValueError(
                f"{len(wrong)} frozen weights ({wrong[0]}, ...) are not what the last merge made of them, since they "
                "were loaded or changed; call load_state_dict() with the state that was saved together with them"
            )
        self.kept = needed

    def add(self, name: str, delta: Tensor, engine: Engine) -> Tensor:
        if name in self.kept:
            return super().add(name, delta, engine)
        return engine.read_weight(name).float() + delta

    def exact(self, name: str, engine: Engine) -> Tensor:
        """The float32 value of a weight, on every rank; a collective."""
        if name not in self.kept:
            return engine.read_weight(name).float()
        value = torch.empty(engine.shapes[name], dtype=torch.float32, device=engine.device)
        if name in self.weights:
            value.copy_(self.weights[name])
        engine.broadcast(value, self.owner[name])
        return value

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Takes the masters of this rank from those of all ranks."""
        self.kept = list(values)
        self.weights = {}
        for name in self.owned:
            if name in values:
                self.put(name, values[name])


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
