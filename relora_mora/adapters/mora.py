"""MoRA's adapter: ``delta = D M C`` (arXiv 2405.12130, eq. 6), a square M between parameter-free operators."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.adapters.layers import HOST, AdapterLinear, Flops, Kept
from relora_mora.adapters.stored import EightBits, Stored, refuse_second_derivatives
from relora_mora.config.schema import MethodConfig
from relora_mora.operators import Draw, GroupingOperator, Operator, make_operator, square_size, transposed_product


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
        """At most three layers. Those that are called must be in one backward and in one checkpointed region."""
        shared = _SharedInput()
        for index, layer in enumerate(layers):
            layer.shared_input = shared
            layer.following = tuple(layers[index + 1 :])

    def set_operator(self, mora_type: int, draw: Draw | None = None) -> None:
        self.operator = make_operator(mora_type, self.in_features, self.out_features, self.square_size, draw)
        self.drop_merged()

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return ("mora_M",)

    def delta_of(self, *parameters: Tensor) -> Tensor:
        return self.operator.delta(*parameters)

    def build_merged(self, weight: Tensor) -> Tensor:
        return self.operator.add_delta(weight, self.mora_M.to(weight.dtype))

    def fresh(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.square_size, self.square_size, **HOST)

    def singular_values(self, *parameters: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.operator.core(*parameters))[: self.square_size * self.operator.blocks]

    def as_lora(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.operator.factors(*parameters)

    def flops(self, tokens: int, cycle: Sequence[int]) -> Flops:
        blocks = self._blocks(cycle)
        product = 2.0 * self.square_size**2 * (sum(blocks) / len(blocks))
        # merged: only dM is an additional product; decoupled: M C x, the gradient of C x, and dM
        return Flops(0.0, product) if self.uses_merged_form(tokens) else Flops(product, 3 * product)

    def kept(self, tokens: int, cycle: Sequence[int]) -> list[Kept]:
        elements = self.square_size * max(self._blocks(cycle))
        name = f"C x for {self.square_size} -> {self.out_features}"
        return [Kept(name, elements, shared=self.uses_merged_form(tokens)), *self._kept_by_dropout()]

    def _blocks(self, cycle: Sequence[int]) -> list[int]:
        """How often each operator applies M to one token."""
        return [make_operator(kind, self.in_features, self.out_features, self.square_size).blocks for kind in cycle]

    def _merged(self, x: Tensor) -> Tensor:
        handle = self.shared_input.handle(self, x) if torch.is_grad_enabled() and self.mora_M.requires_grad else None
        return _MergedMoRA.apply(x, self.weight, self.mora_M, self.built, self.operator, handle, self.stored)

    def needs_handle(self, x: Tensor) -> bool:
        """Whether this layer will need a handle when it is called with this x.

        The first layer of a group calls this in its own forward. Under ZeRO-3 that must not touch M, or DeepSpeed would
        treat M as a parameter of the first layer and gather it there. M always trains under ZeRO-3.
        """
        return self.multiplies_merged(x) and (self.gathered or self.mora_M.requires_grad)

    def _decoupled(self, x: Tensor) -> Tensor:
        if isinstance(self.stored, EightBits) and isinstance(self.operator, GroupingOperator) and not self.drops:
            return _DecoupledMoRA.apply(x, self.weight, self.mora_M, self.operator, self.stored)
        return super()._decoupled(x)

    def _delta(self, x: Tensor) -> Tensor:
        return self.operator.decompress(F.linear(self.operator.compress(x), self.mora_M.to(x.dtype)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.operator}"


def operator_in_use(layers: Iterable[AdapterLinear]) -> int | None:
    """The operator in use, the same in all layers; None for a method without operators."""
    used = {layer.operator.mora_type for layer in layers if isinstance(layer, MoRALinear)}
    assert len(used) <= 1, f"layers disagree about the operator: {sorted(used)}"
    return used.pop() if used else None


def set_operators(layers: Iterable[AdapterLinear], mora_type: int | None, draw: Draw) -> None:
    """Switches the operator of all layers that have one."""
    for layer in layers:
        if mora_type is not None and isinstance(layer, MoRALinear):
            layer.set_operator(mora_type, draw)


class _SharedInput:
    """Computes C x once for MoRA layers with the same input x and operator, and all their dM in one autograd node.

    The first layer that is called opens a node for itself and the layers that follow. Each layer gets a handle from the
    node when it is called. A handle has the shape of y but no memory of its own, and its gradient is dy. When the node
    has every dy, it computes all dM. Under ZeRO-3 each layer has its own node, because autograd needs M when the node
    is opened and when dM is stored; C x is still computed once.
    """

    def __init__(self) -> None:
        self.pending: _PendingInput | None = None  # while not all layers have been called

    def handle(self, layer: MoRALinear, x: Tensor) -> Tensor:
        """x [..., in] -> a handle [..., out] for this layer"""
        pending = self.pending
        if pending is None or not pending.is_for(layer, x):
            operator = layer.operator
            with torch.no_grad():
                compressed = operator.compress_for_gradient(x)
            following = [other for other in layer.following if other.operator is operator and other.needs_handle(x)]
            pending = _PendingInput(x, x._version, operator, compressed, [layer, *following], [])
        while pending.layers[0] is not layer:  # skip layers that were not called
            del pending.layers[:1], pending.handles[:1]
        if not pending.handles:
            members = [layer] if layer.gathered else pending.layers
            squares = [member.mora_M for member in members]
            pending.handles.extend(_SquareGradients.apply(pending.compressed, x.shape[:-1], pending.operator, *squares))
        del pending.layers[0]
        self.pending = pending if pending.layers else None
        return pending.handles.pop(0)


class _PendingInput(NamedTuple):
    """An input x with its version, its C x, the layers that have not been called yet, and their handles, if any."""

    x: Tensor
    version: int
    operator: Operator
    compressed: Tensor
    layers: list[MoRALinear]
    handles: list[Tensor]

    def is_for(self, layer: MoRALinear, x: Tensor) -> bool:
        """Whether the layer is still to be called and C x belongs to this x: the same tensor, or an alias (ZeRO-3)."""
        if self.operator is not layer.operator or not any(other is layer for other in self.layers):
            return False
        if torch.compiler.is_compiling():
            return x is self.x
        same_memory = x.untyped_storage()._cdata == self.x.untyped_storage()._cdata
        layout, own_layout = ((t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (x, self.x))
        return same_memory and x._version == self.version and layout == own_layout


class _SquareGradients(torch.autograd.Function):
    """Returns one handle [..., out] per M; computes all dM from the handles' gradients dy and C x [..., R]."""

    @staticmethod
    def forward(ctx: Any, compressed: Tensor, rows: Any, operator: Operator, *squares: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(compressed)
        ctx.operator = operator
        ctx.set_materialize_grads(False)
        return tuple(compressed.new_empty(()).expand(*rows, operator.out_features) for _ in squares)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        (compressed,) = ctx.saved_tensors
        squares = iter(ctx.operator.square_gradients(compressed, [dy for dy in grads if dy is not None]))
        return None, None, None, *(None if dy is None else next(squares) for dy in grads)


class _MergedMoRA(torch.autograd.Function):
    """``x (W + D M C)^T`` without saving x: W is frozen, and the handle passes dy to the node that computes dM.

    ``merged`` is ``W + D M C`` if it is resident. Otherwise it is built in forward and again in backward.
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
        stored: Stored,
    ) -> Tensor:
        ctx.save_for_backward(weight, M, merged)
        ctx.operator = operator
        ctx.stored = stored
        if merged is not None:
            return stored.linear(x, merged)
        dense = stored.dense(weight, x.dtype)
        return F.linear(x, operator.add_delta(dense, M.to(dense.dtype)).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, Tensor | None, None]:
        refuse_second_derivatives()
        weight, M, merged = ctx.saved_tensors
        dy = grads[0]
        dx = None
        if ctx.needs_input_grad[0] and merged is not None:
            dx = ctx.stored.linear_transposed(dy, merged)
        elif ctx.needs_input_grad[0]:
            dense = ctx.stored.dense(weight, dy.dtype, after=dy)
            dx = dy @ ctx.operator.add_delta(dense, M.to(dense.dtype), after=dy).to(dy.dtype)
        return dx, None, None, None, None, dy if ctx.needs_input_grad[5] else None, None


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
        return stored.linear(x, weight, F.linear(compressed, M.to(x.dtype)), operator.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        refuse_second_derivatives()
        weight, M, compressed = ctx.saved_tensors
        dy = grads[0]
        reduced = ctx.operator.decompress_transposed(dy)
        dx = dM = None
        if ctx.needs_input_grad[0]:
            dx = ctx.stored.linear_transposed(dy, weight, reduced @ M.to(dy.dtype), ctx.operator.inputs)
        if ctx.needs_input_grad[2]:
            dM = transposed_product(reduced, compressed)
        return dx, None, dM, None, None
