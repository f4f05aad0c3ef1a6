"""Puts adapter layers into a model that knows nothing of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from relora_mora.config import MethodConfig
from relora_mora.methods.layers import AdapterLinear, LoRALinear, MoRALinear, adapter_parameters, layer_generator
from relora_mora.operators import square_size


@dataclass(frozen=True)
class Injection:
    """What :func:`inject` replaced: layer names by kind of projection, and the number of adapter parameters."""

    by_kind: dict[str, tuple[str, ...]]
    parameters: int

    @property
    def layers(self) -> int:
        return sum(len(names) for names in self.by_kind.values())


def decoder_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer, adapter or not, inside the decoder layers (``....layers.<i>....``)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | AdapterLinear) and ".layers." in name:
            yield name, module


def inject(model: nn.Module, method: MethodConfig, *, seed: int, mora_type: int | None = None) -> Injection:
    """Replaces the target linears of the decoder by adapter layers, in place.

    ``mora_type`` is the operator to begin with (default: the first of the cycle). Raises ValueError when a target name
    matches no layer, or when an operator cannot be built for a layer's shape.
    """
    by_kind: dict[str, list[str]] = {kind: [] for kind in method.target_modules}
    for name, module in list(decoder_linears(model)):
        parent_name, _, kind = name.rpartition(".")
        if kind in by_kind and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent_name), kind, _adapter(name, module, method, seed, mora_type))
            by_kind[kind].append(name)
    unmatched = [kind for kind, names in by_kind.items() if not names]
    if unmatched:
        present = sorted({name.rpartition(".")[2] for name, _ in decoder_linears(model)})
        raise ValueError(
            f"method.target_modules: no linear of the decoder is named {', '.join(unmatched)}; it has {', '.join(present)}"
        )
    count = sum(model.get_parameter(name).numel() for name in adapter_parameters(model))
    return Injection({kind: tuple(names) for kind, names in by_kind.items()}, count)


def layer_square_size(method: MethodConfig, in_features: int, out_features: int) -> int:
    """R of one layer: ``method.square_size``, or from the rank and rounded down to ``method.square_multiple``.

    Raises ValueError when nothing is left after rounding.
    """
    if method.square_size is not None:
        return method.square_size
    size = square_size(in_features, out_features, method.rank) // method.square_multiple * method.square_multiple
    if size == 0:
        raise ValueError(
            f"method.square_multiple: {method.square_multiple} is more than R of a {in_features} -> {out_features} layer at "
            f"method.rank={method.rank}; lower it or raise the rank"
        )
    return size


def _adapter(name: str, linear: nn.Linear, method: MethodConfig, seed: int, mora_type: int | None) -> AdapterLinear:
    if method.name in ("mora", "remora"):
        size = layer_square_size(method, linear.in_features, linear.out_features)
        return MoRALinear(linear, size, mora_type or method.operators[0], method.form)
    return LoRALinear(linear, method.rank, method.lora_alpha, layer_generator(seed, name, 0), method.form)
