"""SLTrain's adapter: LoRA plus a sparse matrix, ``delta = (alpha / r) B A + S`` (arXiv 2406.02214, eq. 1).

The support of S, which is the set of its elements that train, is fixed and random. It is computed from a seed whenever
it is needed, with the same result on every device, so a layer keeps only the values. Each row of S has the same number
of values, k: its ``in`` columns are cut into k runs, and each run has one value, in a random column.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.adapters.layers import HOST, SPARSE_VALUES, Flops, Kept
from relora_mora.adapters.lora import LoRALinear, add_product
from relora_mora.adapters.stored import Stored, refuse_second_derivatives
from relora_mora.config.schema import MethodConfig
from relora_mora.operators import Draw
from relora_mora.system.seeds import derived_seed

_BITS_32 = 2**32 - 1


class SLTrainLinear(LoRALinear):
    """``W + scale B A + S`` with the values of S in a matrix [out, k].

    If a run draws its weights, W begins with the initial values of S and zero elsewhere, so that the model's weight is
    the paper's ``B A + S``. The trained values begin with zero, as the delta of every adapter does.
    """

    break_even = 0.0  # decoupled, x is also multiplied with a dense S
    dense_gradient = True

    def __init__(
        self,
        linear: nn.Linear,
        lora_rank: int,
        alpha: float | None,
        density: float,
        generator: torch.Generator,
        form: str = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(linear, lora_rank, alpha, generator, form, dropout)
        self.row_values = values_per_row(density, self.in_features)
        self.index_bytes = (
            3 * 8 * self.out_features * self.row_values
        )  # a place, and its number before and after a step
        self.seed = generator.initial_seed()
        # not a number, for which torch.compile would make a program for each layer
        self.support_seed = torch.tensor(self.seed & _BITS_32, device="cpu")
        self.sparse_values = nn.Parameter(self.fresh(SPARSE_VALUES, generator).to(linear.weight.dtype))

    @classmethod
    def from_settings(
        cls, linear: nn.Linear, method: MethodConfig, generator: torch.Generator, mora_type: int | None, draw: Draw
    ) -> Self:
        sizes = (method.rank, method.lora_alpha, method.sparse_density)
        return cls(linear, *sizes, generator, method.form, method.dropout)

    @classmethod
    def parameters_for(cls, method: MethodConfig, in_features: int, out_features: int) -> int:
        values = out_features * values_per_row(method.sparse_density, in_features)
        return super().parameters_for(method, in_features, out_features) + values

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return (*super().adapter_names, SPARSE_VALUES)

    def delta_of(self, *parameters: Tensor) -> Tensor:
        A, B, values = parameters
        return self._add_values(super().delta_of(A, B), values)

    def build_merged(self, weight: Tensor) -> Tensor:
        return self._add_values(super().build_merged(weight), self.sparse_values)

    def fresh(self, name: str, generator: torch.Generator) -> Tensor:
        if name == SPARSE_VALUES:
            return torch.zeros(self.out_features, self.row_values, **HOST)
        return super().fresh(name, generator)

    def initial_weight(self) -> Tensor:
        """S [out, in] as the paper draws it: uniform in [-1 / sqrt(in), 1 / sqrt(in)]"""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "initial"))
        values = torch.empty(self.out_features, self.row_values)
        values.uniform_(-1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features), generator=generator)
        return self._add_values(torch.zeros(self.out_features, self.in_features), values)

    def singular_values(self, *parameters: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.delta_of(*parameters))

    def as_lora(self, *parameters: Tensor) -> None:
        return None

    def flops(self, tokens: int, cycle: Sequence[int]) -> Flops:
        lora = super().flops(tokens, cycle)
        product = 2.0 * self.in_features * self.out_features  # of S in forward, and of its gradient
        if not self.uses_merged_form(tokens):
            return Flops(lora.forward + product, lora.both + 3 * product)
        build = product * self.lora_rank / tokens  # as large as the products that make dA and dB of dW
        return Flops(lora.forward, 2 * lora.forward + product + 2 * build)

    def kept(self, tokens: int, cycle: Sequence[int]) -> list[Kept]:
        kept = super().kept(tokens, cycle)
        if self.uses_merged_form(tokens):
            return kept
        return [*kept, Kept("S", -(-self.in_features * self.out_features // tokens), shared=False)]

    def _merged(self, x: Tensor) -> Tensor:
        parameters = (self.lora_A, self.lora_B, self.sparse_values, self.support_seed)
        return _MergedSLTrain.apply(x, self.base_weight, *parameters, self.built, self.scale, self.stored)

    def _delta(self, x: Tensor) -> Tensor:
        S = self._add_values(x.new_zeros(self.out_features, self.in_features), self.sparse_values)
        return super()._delta(x) + F.linear(x, S)

    def _add_values(self, matrix: Tensor, values: Tensor) -> Tensor:
        """Adds the values [out, k] to matrix [out, in] at their places, in place, and returns it."""
        columns = support(self.support_seed, values.shape, self.in_features, matrix.device)
        return matrix.scatter_add_(1, columns, values.to(matrix.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, values per row={self.row_values}"


def values_per_row(density: float, in_features: int) -> int:
    """k, the number of values in each row of S [out, in]"""
    return max(1, round(density * in_features))


def support(seed: Tensor, shape: Sequence[int], columns: int, device: torch.device) -> Tensor:
    """The columns of values of this ``shape`` [rows, k], ascending in each row.

    ``seed`` is a number of 32 bits, in host memory. The numbers of different places are independent, and each is
    uniform in its run of columns. Products stay below 2^63.
    """
    rows, row_values = shape
    place = torch.arange(rows * row_values, device=device).view(rows, row_values)
    number = _mixed(_mixed(place & _BITS_32) ^ seed)
    ends = torch.arange(row_values + 1, device=device) * columns // row_values
    return ends[:-1] + (number * ends.diff() >> 32)


def _mixed(number: Tensor) -> Tensor:
    """A permutation of the numbers of 32 bits that scatters them: multiplications and shifts, as hash functions use."""
    number = number ^ (number >> 15)
    number = (number * 0x2C1B3C6D) & _BITS_32
    number = number ^ (number >> 12)
    number = (number * 0x297A2D39) & _BITS_32
    return number ^ (number >> 15)


class _MergedSLTrain(torch.autograd.Function):
    """``x (W + scale B A + S)^T``. All gradients of the adapter come from one dense dW [out, in].

    ``merged`` is the weight if it is resident. Otherwise it is built in forward and again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        values: Tensor,
        seed: Tensor,
        merged: Tensor | None,
        scale: float,
        stored: Stored,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B, values, seed, merged)
        ctx.scale = scale
        ctx.stored = stored
        if merged is not None:
            return stored.linear(x, merged)
        columns = support(seed, values.shape, x.shape[-1], x.device)
        return F.linear(x, _built(stored.dense(weight, x.dtype), A, B, values, columns, scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        x, weight, A, B, values, seed, merged = ctx.saved_tensors
        dy = grads[0]
        columns = support(seed, values.shape, x.shape[-1], x.device)
        dx = None
        if ctx.needs_input_grad[0] and merged is not None:
            dx = ctx.stored.linear_transposed(dy, merged)
        elif ctx.needs_input_grad[0]:
            dense = ctx.stored.dense(weight, dy.dtype, after=dy)
            dx = dy @ _built(dense, A, B, values, columns, ctx.scale).to(dy.dtype)
        dW = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        dA = ctx.scale * (B.to(dW.dtype).T @ dW)
        dB = ctx.scale * (dW @ A.to(dW.dtype).T)
        return dx, None, dA, dB, dW.gather(1, columns), None, None, None, None


def _built(weight: Tensor, A: Tensor, B: Tensor, values: Tensor, columns: Tensor, scale: float) -> Tensor:
    """weight + scale B A + S [out, in], in the dtype of the weight"""
    return add_product(weight, A, B, scale).scatter_add_(1, columns, values.to(weight.dtype))
