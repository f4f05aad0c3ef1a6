"""MoRA's adapter: ``delta = D M C`` (arXiv 2405.12130, eq. 6), a square M between operators without parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.config import MethodConfig
from relora_mora.methods.layers import AdapterLinear, Flops, Kept
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

    def flops(self, tokens: int, cycle: Sequence[int]) -> Flops:
        blocks = self._blocks(cycle)
        product = 2.0 * self.square_size**2 * (sum(blocks) / len(blocks))
        # merged: only dM is a product of its own; decoupled: M C x, its input's gradient, dM
        return Flops(0.0, product) if self.uses_merged_form(tokens) else Flops(product, 3 * product)

    def kept(self, tokens: int, cycle: Sequence[int]) -> list[Kept]:
        elements = self.square_size * max(self._blocks(cycle))
        of_input = Kept(f"C x of {self.square_size}", elements, shared=self.uses_merged_form(tokens))
        return [of_input, *self._kept_by_dropout()]

    def _blocks(self, cycle: Sequence[int]) -> list[int]:
        """How often M is applied to a token, by each operator."""
        return [make_operator(kind, self.in_features, self.out_features, self.square_size).blocks for kind in cycle]

    def _merged(self, x: Tensor) -> Tensor:
        return _MergedMoRA.apply(x, self.weight, self.mora_M, self.built, self.operator, torch.is_grad_enabled())

    def _delta(self, x: Tensor) -> Tensor:
        return self.operator.decompress(F.linear(self.operator.compress(x), self.mora_M))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.operator}"


class _MergedMoRA(torch.autograd.Function):
    """``x (W + D M C)^T`` that keeps ``C x`` [..., R] for backward, not x: W is frozen, so only dM needs the input.

    ``merged`` is ``W + D M C`` where it is resident; else it is built in forward and again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, M: Tensor, merged: Tensor | None, operator: Operator, training: bool
    ) -> Tensor:
        needs_square = training and ctx.needs_input_grad[2]
        ctx.save_for_backward(_compress_once(x, operator) if needs_square else None, weight, M, merged)
        ctx.operator = operator
        return F.linear(x, operator.add_delta(weight, M) if merged is None else merged)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None, None]:
        compressed, weight, M, merged = ctx.saved_tensors
        dy = grads[0]
        operator = ctx.operator
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (operator.add_delta(weight, M, after=dy) if merged is None else merged)
        dM = operator.square_gradient(compressed, dy) if compressed is not None else None
        return dx, None, dM, None, None, None


def _compress_once(x: Tensor, operator: Operator) -> Tensor:
    """``C x``, made once for layers that see the same input and have the same C: q, k and v; gate and up.

    It is an attribute of the storage of x, so it goes when x goes. The storage and not x, because ZeRO-3 hands each
    layer an alias of its own. What has no grad_fn may be a buffer that is filled again without autograd's notice.
    """
    if torch.compiler.is_compiling() or x.grad_fn is None:
        return operator.compress_for_gradient(x)
    storage: Any = x.untyped_storage()
    key = (operator.input_map, x._version, x.storage_offset(), x.shape, x.stride(), x.dtype)
    held = getattr(storage, "_compressed", None)
    if held is None or held[0] != key:
        held = storage._compressed = key, operator.compress_for_gradient(x)
    return held[1]
