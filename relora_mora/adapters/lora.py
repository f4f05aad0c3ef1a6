"""LoRA's adapter: ``delta = (alpha / r) B A`` (arXiv 2106.09685, eq. 3)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.adapters.layers import HOST, AdapterLinear
from relora_mora.config.schema import MethodConfig


@dataclass(frozen=True)
class LowRank:
    """``delta = scale B A``, with gradients that are products through r features, never through [out, in]."""

    scale: float

    def add_delta(self, weight: Tensor, A: Tensor, B: Tensor, after: Tensor | None = None) -> Tensor:
        return torch.addmm(weight, B, A, alpha=self.scale)

    def gradients(self, x: Tensor, dy: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        x = x.reshape(-1, x.shape[-1])
        dy = dy.reshape(-1, dy.shape[-1])
        dA = self.scale * ((dy @ B.to(dy.dtype)).T @ x)
        dB = self.scale * (dy.T @ (x @ A.to(x.dtype).T))
        return dA, dB


class LoRALinear(AdapterLinear):
    """``W + scale B A`` with A [r, in] and B [out, r]."""

    break_even = 1.5

    def __init__(
        self, linear: nn.Linear, method: MethodConfig, generator: torch.Generator, mora_type: int | None = None
    ) -> None:
        super().__init__(linear, method, generator)
        self.lora_rank = method.rank
        self.scale = (method.rank if method.lora_alpha is None else method.lora_alpha) / method.rank
        dtype = linear.weight.dtype
        self.lora_A = nn.Parameter(self.fresh("lora_A", generator).to(dtype))
        self.lora_B = nn.Parameter(self.fresh("lora_B", generator).to(dtype))

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return ("lora_A", "lora_B")

    def delta_of(self, *parameters: Tensor) -> Tensor:
        A, B = parameters
        return self.scale * (B @ A)

    @property
    def algebra(self) -> LowRank:
        return LowRank(self.scale)

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

    def _delta(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_rank}, scale={self.scale:g}"
