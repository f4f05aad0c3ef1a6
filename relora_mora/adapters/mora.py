"""MoRA's adapter: ``delta = D M C`` (arXiv 2405.12130, eq. 6), a square M between parameter-free operators."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.adapters.layers import HOST, AdapterLinear, refuse_second_derivatives
from relora_mora.adapters.scope import Scope
from relora_mora.adapters.stored import EightBits
from relora_mora.config.schema import MethodConfig
from relora_mora.operators import GroupingOperator, Operator, make_operator, square_size, transposed_product


def layer_square_size(method: MethodConfig, in_features: int, out_features: int) -> int:
    """R of one layer: ``method.square_size``, or sqrt((in + out) r), rounded as ``method.square_rounding`` says.

    The rounded root is then rounded down to a multiple of ``method.square_multiple``. Raises ValueError if that is 0.
    """
    if method.square_size is not None:
        return method.square_size
    if method.square_rounding == "nearest":  # floor(sqrt(n) + 1/2) in integer arithmetic
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
    """``W + D M C`` with M [R, R]. A merge can switch the operator."""

    break_even = 0.25

    def __init__(
        self, linear: nn.Linear, method: MethodConfig, generator: torch.Generator, mora_type: int | None = None
    ) -> None:
        super().__init__(linear, method, generator)
        self.square_size = size = layer_square_size(method, linear.in_features, linear.out_features)
        self.mora_M = nn.Parameter(torch.zeros(size, size, dtype=linear.weight.dtype))
        self.shared_input: SharedInput | None = None
        self.set_operator(mora_type or method.operators[0])

    operator: Operator

    @classmethod
    def share_input(cls, parent: nn.Module, layers: Sequence[Self]) -> None:
        shared = SharedInput(parent)
        for layer in layers:
            layer.shared_input = shared

    def get_extra_state(self) -> Tensor:
        """The operator in use, so that whoever loads M also gets what M means."""
        return torch.tensor(self.operator.mora_type, dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.set_operator(int(state))

    def set_operator(self, mora_type: int) -> None:
        self.operator = make_operator(mora_type, self.in_features, self.out_features, self.square_size)
        self.drop_merged()

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return ("mora_M",)

    def delta_of(self, *parameters: Tensor) -> Tensor:
        return self.operator.delta(*parameters)

    @property
    def algebra(self) -> Operator:
        return self.operator

    def fresh(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.square_size, self.square_size, **HOST)

    def singular_values(self, *parameters: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.operator.core(*parameters))[: self.square_size * self.operator.blocks]

    def as_lora(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.operator.factors(*parameters)

    @torch.no_grad()
    def _for_gradients(self, x: Tensor) -> Tensor:
        """C x as :meth:`Operator.square_gradient` takes it, in place of x: W is frozen, and dM = (D^T dy)^T (C x)"""
        if self.shared_input is None or torch.compiler.is_compiling():  # a compiler finds equal sums itself
            return self.operator.compress_for_gradient(x)
        return self.shared_input.compress(x, self.operator)

    def _decoupled(self, x: Tensor) -> Tensor:
        if isinstance(self.stored, EightBits) and isinstance(self.operator, GroupingOperator) and not self.drops:
            return _DecoupledMoRA.apply(x, self.base_weight, self.mora_M, self.operator, self.stored)
        return super()._decoupled(x)

    def _delta(self, x: Tensor) -> Tensor:
        return self.operator.decompress(F.linear(self.operator.compress(x), self.mora_M.to(x.dtype)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.operator}"


def operator_in_use(model: nn.Module) -> int | None:
    """The operator in use, the same in all layers; None for a method without operators."""
    used = {module.operator.mora_type for module in model.modules() if isinstance(module, MoRALinear)}
    assert len(used) <= 1, f"layers disagree about the operator: {sorted(used)}"
    return used.pop() if used else None


def set_operators(model: nn.Module, mora_type: int | None) -> None:
    """Switches the operator of all layers that have one."""
    for module in model.modules():
        if mora_type is not None and isinstance(module, MoRALinear):
            module.set_operator(mora_type)


class SharedInput(Scope):
    """C x for MoRA layers with the same input: computed once, and kept only while the module around them runs.

    Under ZeRO-3 each layer gets an alias of its own, and computes C x again.
    """

    def reset(self) -> None:
        super().reset()
        self.last: tuple[Tensor, int, Operator, Tensor] | None = None

    def compress(self, x: Tensor, operator: Operator) -> Tensor:
        """x [..., in] -> C x [..., R]"""
        last = self.last  # another thread may close it
        if last is not None:
            of, version, used, compressed = last
            if x is of and used is operator and x._version == version:
                return compressed
        compressed = operator.compress_for_gradient(x)
        if self.depth:
            self.last = x, x._version, operator, compressed
        return compressed

    def close(self) -> None:
        self.last = None


class _DecoupledMoRA(torch.autograd.Function):
    """``W x + D M C x`` with W in 8 bits. The passes that scale the sums of both products also add the copies of D."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, M: Tensor, operator: GroupingOperator, stored: EightBits
    ) -> Tensor:
        compressed = operator.compress(x)
        ctx.save_for_backward(weight, M, compressed)
        ctx.operator = operator
        ctx.stored = stored
        return stored.linear(x, weight, (F.linear(compressed, M.to(x.dtype)), operator.outputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        refuse_second_derivatives()
        weight, M, compressed = ctx.saved_tensors
        dy = grads[0]
        reduced = ctx.operator.decompress_transposed(dy)
        dx = dM = None
        if ctx.needs_input_grad[0]:
            dx = ctx.stored.linear_transposed(dy, weight, (reduced @ M.to(dy.dtype), ctx.operator.inputs))
        if ctx.needs_input_grad[2]:
            dM = transposed_product(reduced, compressed)
        return dx, None, dM, None, None
