"""A contender with the operations of MoRA's released code, type 1: the decoupled form in plain autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.adapters.layers import adapter_layers
from relora_mora.adapters.mora import MoRALinear

RELEASED_TYPE = 1


class ReleasedLinear(MoRALinear):
    """``W x + D M C x`` (arXiv 2405.12130, eq. 6); autograd records each map as an operation on the activations.

    C pads the input with its first features to whole groups of R (a copy) and adds up the groups. D repeats the R
    results until they are long enough (a copy) and cuts them. Only operator 1 is supported.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        result = F.linear(x, self.weight, self.bias)
        size = self.square_size
        missing = -self.in_features % size
        if missing:
            times, rest = divmod(missing, self.in_features)  # times > 0 only if R is more than twice the inputs
            x = torch.cat([x, *[x] * times, x[..., :rest]], -1)
        compressed = x.view(*x.shape[:-1], x.shape[-1] // size, size).sum(-2)
        changed = F.linear(compressed, self.mora_M)
        repeats = -(-self.out_features // size)
        return result + torch.cat([changed] * repeats, -1)[..., : self.out_features]


def use_released_layers(model: nn.Module) -> None:
    """Replaces every adapter layer of a model by a layer with the released code's operations and the same weight."""
    for name, layer in list(adapter_layers(model)):
        assert isinstance(layer, MoRALinear) and layer.operator.mora_type == RELEASED_TYPE
        parent, _, kind = name.rpartition(".")
        plain: Any = layer  # has the attributes of a linear that are read: features, weight, bias
        setattr(model.get_submodule(parent), kind, ReleasedLinear(plain, layer.square_size, RELEASED_TYPE, "decoupled"))
