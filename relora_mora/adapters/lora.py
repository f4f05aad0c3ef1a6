"""LoRA's adapter: ``delta = (alpha / r) B A`` (arXiv 2106.09685, eq. 3)."""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.adapters.layers import HOST, AdapterLinear
from relora_mora.adapters.stored import Stored, refuse_second_derivatives
from relora_mora.config.schema import MethodConfig


class LoRALinear(AdapterLinear):
    """``W + scale B A`` with A [r, in] and B [out, r]."""

    break_even = 1.5

    def __init__(
        self,
        linear: nn.Linear,
        lora_rank: int,
        alpha: float | None,
        generator: torch.Generator,
        form: str = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(linear, form, dropout)
        self.lora_rank = lora_rank
        self.scale = (lora_rank if alpha is None else alpha) / lora_rank
        dtype = linear.weight.dtype
        self.lora_A = nn.Parameter(self.fresh("lora_A", generator).to(dtype))
        self.lora_B = nn.Parameter(self.fresh("lora_B", generator).to(dtype))

    @classmethod
    def from_settings(
        cls, linear: nn.Linear, method: MethodConfig, generator: torch.Generator, mora_type: int | None
    ) -> Self:
        return cls(linear, method.rank, method.lora_alpha, generator, method.form, method.dropout)

    @classmethod
    def parameters_for(cls, method: MethodConfig, in_features: int, out_features: int) -> int:
        return method.rank * (in_features + out_features)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return ("lora_A", "lora_B")

    def delta_of(self, *parameters: Tensor) -> Tensor:
        A, B = parameters
        return self.scale * (B @ A)

    def build_merged(self, weight: Tensor) -> Tensor:
        return add_product(weight, self.lora_A, self.lora_B, self.scale)

    def fresh(self, name: str, generator: torch.Generator) -> Tensor:
        # a model on the meta device, which only has shapes, needs no values either
        place = HOST | ({"device": "meta"} if torch.get_default_device().type == "meta" else {})
        if name == "lora_B":
            return torch.zeros(self.out_features, self.lora_rank, **place)
        A = torch.empty(self.lora_rank, self.in_features, **place)
        return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)

    def singular_values(self, *parameters: Tensor) -> Tensor:
        A, B = parameters
        return torch.linalg.svdvals(self.scale * (torch.linalg.qr(B)[1] @ torch.linalg.qr(A.mT)[1].mT))

    def as_lora(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        A, B = parameters
        return A, B

    def _merged(self, x: Tensor) -> Tensor:
        return _MergedLoRA.apply(
            x, self.base_weight, self.lora_A, self.lora_B, self.merged_weight, self.scale, self.stored
        )

    def _delta(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_rank}, scale={self.scale:g}"


class _MergedLoRA(torch.autograd.Function):
    """``x (W + scale B A)^T``. The gradients of A and B are products through r features, never through [out, in].

    ``merged`` is ``W + scale B A`` if it is resident. Otherwise it is built in forward and again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        merged: Tensor | None,
        scale: float,
        stored: Stored,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B, merged)
        ctx.scale = scale
        ctx.stored = stored
        if merged is not None:
            return stored.linear(x, merged)
        return F.linear(x, add_product(stored.dense(weight, x.dtype), A, B, scale).to(x.dtype))

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None, None]:
        refuse_second_derivatives()
        x, weight, A, B, merged = ctx.saved_tensors
        dy = grads[0]
        scale = ctx.scale
        dx = None
        if ctx.needs_input_grad[0] and merged is not None:
            dx = ctx.stored.linear_transposed(dy, merged)
        elif ctx.needs_input_grad[0]:
            dx = dy @ add_product(ctx.stored.dense(weight, dy.dtype, after=dy), A, B, scale).to(dy.dtype)
        x = x.reshape(-1, x.shape[-1])
        dy = dy.reshape(-1, dy.shape[-1])
        dA = scale * ((dy @ B.to(dy.dtype)).T @ x) if ctx.needs_input_grad[2] else None
        dB = scale * (dy.T @ (x @ A.to(x.dtype).T)) if ctx.needs_input_grad[3] else None
        return dx, None, dA, dB, None, None, None


def add_product(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """weight + scale B A [out, in], in the dtype of the weight"""
    return torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype), alpha=scale)
