"""MoRA's adapter: ``delta = D M C`` (arXiv 2405.12130, eq. 6), a square M between operators without parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.adapters.layers import AdapterLinear, Flops, Kept
from relora_mora.config.schema import MethodConfig
from relora_mora.operators import Draw, Operator, make_operator, square_size


def layer_square_size(method: MethodConfig, in_features: int, out_features: int) -> int:
    """R of one layer: ``method.square_size``, or sqrt((in + out) r), rounded as ``method.square_rounding`` says.

    Then it is rounded down to ``method.square_multiple``.

    Raises ValueError when nothing is left after rounding.
    """
    if method.square_size is not None:
        return method.square_size
    if method.square_rounding == "nearest":  # floor(sqrt(n) + 1/2) in whole numbers
        size = (square_size(in_features, out_features, 4 * method.rank) + 1) // 2
    else:
        size = square_size(in_features, out_features, method.rank)
    size = size // method.square_multiple * method.square_multiple
    if size == 0:
        raise ValueError(
            f"method.square_multiple: {method.square_multiple} is more than R of a {in_features} -> {out_features} "
            f"layer at method.rank={method.rank}; lower it or raise the rank"
        )
    return size


class MoRALinear(AdapterLinear):
    """``W + D M C`` with M [R, R]; the operator in use is switched between cycles."""

    break_even = 0.25
    weights_built = 2  # delta and W + delta

    def __init__(
        self,
        linear: nn.Linear,
        size: int,
        mora_type: int,
        form: str = "auto",
        dropout: float = 0.0,
        draw: Draw | None = None,
    ) -> None:
        super().__init__(linear, form, dropout)
        self.square_size = size
        self.mora_M = nn.Parameter(torch.zeros(size, size, dtype=linear.weight.dtype))
        self.shared_input = _SharedInput()
        self.following: tuple[MoRALinear, ...] = ()  # layers with the same input that are called after this one
        self.set_operator(mora_type, draw)

    operator: Operator

    @classmethod
    def from_settings(
        cls, linear: nn.Linear, method: MethodConfig, generator: torch.Generator, mora_type: int | None, draw: Draw
    ) -> Self:
        size = layer_square_size(method, linear.in_features, linear.out_features)
        return cls(linear, size, mora_type or method.operators[0], method.form, method.dropout, draw)

    @classmethod
    def parameters_for(cls, method: MethodConfig, in_features: int, out_features: int) -> int:
        return layer_square_size(method, in_features, out_features) ** 2

    @classmethod
    def share_input(cls, layers: Sequence[Self]) -> None:
        """At most three. One backward must reach all of them that are called, and one checkpointed region hold them."""
        shared = _SharedInput()
        for place, layer in enumerate(layers):
            layer.shared_input = shared
            layer.following = tuple(layers[place + 1 :])

    def set_operator(self, mora_type: int, draw: Draw | None = None) -> None:
        self.operator = make_operator(mora_type, self.in_features, self.out_features, self.square_size, draw)
        self.drop_merged()

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return ("mora_M",)

    def delta_of(self, *parameters: Tensor) -> Tensor:
        return self.operator.delta(*parameters)

    def build_merged(self, weight: Tensor) -> Tensor:
        return self.operator.add_delta(weight, self.mora_M)

    def fresh(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.square_size, self.square_size)

    def singular_values(self, *parameters: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.operator.core(*parameters))[: self.square_size * self.operator.blocks]

    def as_lora(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.operator.factors(*parameters)

    def flops(self, tokens: int, cycle: Sequence[int]) -> Flops:
        blocks = self._blocks(cycle)
        product = 2.0 * self.square_size**2 * (sum(blocks) / len(blocks))
        # merged: only dM is a product of its own; decoupled: M C x, its input's gradient, dM
        return Flops(0.0, product) if self.uses_merged_form(tokens) else Flops(product, 3 * product)

    def kept(self, tokens: int, cycle: Sequence[int]) -> list[Kept]:
        elements = self.square_size * max(self._blocks(cycle))
        of_input = Kept(
            f"C x for {self.square_size} -> {self.out_features}", elements, shared=self.uses_merged_form(tokens)
        )
        return [of_input, *self._kept_by_dropout()]

    def _blocks(self, cycle: Sequence[int]) -> list[int]:
        """How often M is applied to a token, by each operator."""
        return [make_operator(kind, self.in_features, self.out_features, self.square_size).blocks for kind in cycle]

    def _merged(self, x: Tensor) -> Tensor:
        handle = self.shared_input.handle(self, x) if torch.is_grad_enabled() and self.mora_M.requires_grad else None
        return _MergedMoRA.apply(x, self.weight, self.mora_M, self.built, self.operator, handle)

    def asks(self, x: Tensor) -> bool:
        """Whether this layer will ask for a handle if it gets this x.

        Another layer asks this in its own forward. Under ZeRO-3 that must not touch M: DeepSpeed would take M for a
        parameter that the other layer uses, and would gather it there. M always trains under ZeRO-3.
        """
        return self.multiplies_merged(x) and (self.gathered or self.mora_M.requires_grad)

    def _delta(self, x: Tensor) -> Tensor:
        return self.operator.decompress(F.linear(self.operator.compress(x), self.mora_M))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.operator}"


class _SharedInput:
    """C x of MoRA layers that see the same input x and have the same operator, and the node that makes all their dM.

    The first layer that is called opens a node of autograd for those that follow it as well, and gets a handle from it,
    as they do when they are called. A handle has the shape of y and no memory; its gradient is dy. When the node has
    every dy, it makes all dM. Under ZeRO-3 each layer has a node of its own, for autograd wants its M to be there when
    the node is opened and when dM is put beside it; C x is still made once.
    """

    def __init__(self) -> None:
        self.seen: _Seen | None = None  # while layers are waited for

    def handle(self, layer: MoRALinear, x: Tensor) -> Tensor:
        """x [..., in] -> a handle [..., out] for this layer"""
        seen = self.seen
        if seen is None or not seen.is_for(layer, x):
            operator = layer.operator
            with torch.no_grad():
                compressed = operator.compress_for_gradient(x)
            following = [other for other in layer.following if other.operator is operator and other.asks(x)]
            seen = _Seen(x, x._version, operator, compressed, [layer, *following], [])
        while seen.waiting[0] is not layer:  # what was not called
            del seen.waiting[:1], seen.handles[:1]
        if not seen.handles:
            together = [layer] if layer.gathered else seen.waiting
            squares = [member.mora_M for member in together]
            seen.handles.extend(_SquareGradients.apply(seen.compressed, x.shape[:-1], seen.operator, *squares))
        del seen.waiting[0]
        self.seen = seen if seen.waiting else None
        return seen.handles.pop(0)


class _Seen(NamedTuple):
    """An input, ``version`` at that time, its C x, the layers that were not called yet, and their handles, if any."""

    x: Tensor
    version: int
    operator: Operator
    compressed: Tensor
    waiting: list[MoRALinear]
    handles: list[Tensor]

    def is_for(self, layer: MoRALinear, x: Tensor) -> bool:
        """Whether the layer is waited for, and C x is of this x: itself, or as under ZeRO-3 an alias."""
        if self.operator is not layer.operator or not any(other is layer for other in self.waiting):
            return False
        if torch.compiler.is_compiling():
            return x is self.x
        same_memory = x.untyped_storage()._cdata == self.x.untyped_storage()._cdata
        return same_memory and x._version == self.version and _layout(x) == _layout(self.x)


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.storage_offset(), x.shape, x.stride(), x.dtype


class _SquareGradients(torch.autograd.Function):
    """Gives handles [..., out], and makes the dM of all of them of their gradients dy and of C x [..., R]."""

    @staticmethod
    def forward(ctx: Any, compressed: Tensor, rows: Any, operator: Operator, *squares: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(compressed)
        ctx.operator = operator
        ctx.set_materialize_grads(False)
        return tuple(compressed.new_empty(()).expand(*rows, operator.out_features) for _ in squares)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (compressed,) = ctx.saved_tensors
        made = iter(ctx.operator.square_gradients(compressed, [dy for dy in grads if dy is not None]))
        return None, None, None, *(None if dy is None else next(made) for dy in grads)


class _MergedMoRA(torch.autograd.Function):
    """``x (W + D M C)^T``, which keeps nothing of x: W is frozen, and the gradient of M is made where dy is sent to.

    ``merged`` is ``W + D M C`` where it is resident; else it is built of M in forward and again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        M: Tensor,
        merged: Tensor | None,
        operator: Operator,
        handle: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, M, merged)
        ctx.operator = operator
        return F.linear(x, operator.add_delta(weight, M) if merged is None else merged)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, Tensor | None]:
        weight, M, merged = ctx.saved_tensors
        dy = grads[0]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (ctx.operator.add_delta(weight, M, after=dy) if merged is None else merged)
        return dx, None, None, None, None, dy if ctx.needs_input_grad[5] else None
