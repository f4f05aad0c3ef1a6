"""Adapter layers: a frozen weight and what is trained beside it.

An adapter layer owns the frozen weight W [out, in] and its trainable parameters, and computes ``(W + delta) x``:
MoRA's ``delta = D M C`` (arXiv 2405.12130, eq. 6), LoRA's ``delta = (alpha / r) B A`` (arXiv 2106.09685, eq. 3). Two forms
with the same result exist: ``merged`` builds ``W + delta`` for each use, which is one product with the tokens instead of
several passes over them; ``decoupled`` is the textbook form, kept as the readable reference.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.operators import Operator, make_operator
from relora_mora.system.seeds import derived_seed


class AdapterLinear(nn.Module):
    """A linear layer whose weight is frozen and gets a trainable ``delta`` [out, in]."""

    # tokens (in + out) / (in out) from which on the merged form takes less time, as measured (docs/method.md)
    break_even: ClassVar[float]

    def __init__(self, linear: nn.Linear, form: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = linear.in_features, linear.out_features, form
        self.weight: Tensor = linear.weight
        self.weight.requires_grad_(False)
        self.bias: Tensor | None = linear.bias

    @property
    @abstractmethod
    def adapter_names(self) -> tuple[str, ...]:
        """The names of the trainable parameters."""

    @abstractmethod
    def delta_of(self, *parameters: Tensor) -> Tensor:
        """What the adapter with these values (in the order of ``adapter_names``) adds to the weight [out, in]."""

    @abstractmethod
    def fresh(self, name: str, generator: torch.Generator) -> Tensor:
        """The float32 value of one trainable parameter at the start of a cycle; they make a delta of zero."""

    @abstractmethod
    def _merged(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _decoupled(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def singular_values(self, *parameters: Tensor) -> Tensor:
        """Singular values of ``delta_of(*parameters)``, without those that are zero by construction."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        y = self._merged(x) if self.uses_merged_form(x.numel() // self.in_features) else self._decoupled(x)
        return y if self.bias is None else y + self.bias

    def uses_merged_form(self, tokens: int) -> bool:
        """``auto`` builds ``W + delta`` where its [out, in] elements are few beside the tokens' [tokens, in + out]."""
        if self.form == "auto":
            return (
                tokens * (self.in_features + self.out_features)
                >= self.break_even * self.in_features * self.out_features
            )
        return self.form == "merged"

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, form={self.form}"


class MoRALinear(AdapterLinear):
    """``W + D M C`` with M [R, R]; the operator in use is switched between cycles."""

    break_even = 0.25

    def __init__(self, linear: nn.Linear, size: int, mora_type: int, form: str = "auto") -> None:
        super().__init__(linear, form)
        self.square_size = size
        self.mora_M = nn.Parameter(torch.zeros(size, size, dtype=linear.weight.dtype))
        self.set_operator(mora_type)

    operator: Operator

    def set_operator(self, mora_type: int) -> None:
        self.operator = make_operator(mora_type, self.in_features, self.out_features, self.square_size)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return ("mora_M",)

    def delta_of(self, *parameters: Tensor) -> Tensor:
        return self.operator.delta(*parameters)

    def fresh(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.square_size, self.square_size)

    def singular_values(self, *parameters: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.operator.delta(*parameters))[
            : self.square_size * getattr(self.operator, "blocks", 1)
        ]

    def _merged(self, x: Tensor) -> Tensor:
        return _MergedMoRA.apply(x, self.weight, self.mora_M, self.operator, torch.is_grad_enabled())

    def _decoupled(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.operator.decompress(F.linear(self.operator.compress(x), self.mora_M))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.operator}"


class _MergedMoRA(torch.autograd.Function):
    """``x (W + D M C)^T`` that keeps ``C x`` [..., R] for backward and not x: W is frozen, so only dM needs the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, M: Tensor, operator: Operator, training: bool) -> Tensor:
        needs_square = training and ctx.needs_input_grad[2]
        ctx.save_for_backward(_compress_once(x, operator) if needs_square else None, weight, M)
        ctx.operator = operator
        return F.linear(x, operator.add_delta(weight, M))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        compressed, weight, M = ctx.saved_tensors
        dy, operator = grads[0], ctx.operator
        dx = dy @ operator.add_delta(weight, M) if ctx.needs_input_grad[0] else None
        dM = operator.square_gradient(compressed, dy) if compressed is not None else None
        return dx, None, dM, None, None


def _compress_once(x: Tensor, operator: Operator) -> Tensor:
    """``C x``, made once for layers that see the same input and have the same C: q, k and v; gate and up.

    It is an attribute of the storage of x, so it goes when x goes. The storage and not x, because ZeRO-3 hands each layer
    an alias of its own. What has no grad_fn may be a buffer that is filled again without autograd's notice.
    """
    if torch.compiler.is_compiling() or x.grad_fn is None:
        return operator.compress(x)
    storage: Any = x.untyped_storage()
    key = (operator.input_map, x._version, x.storage_offset(), x.shape, x.stride(), x.dtype)
    held = getattr(storage, "_compressed", None)
    if held is None or held[0] != key:
        held = storage._compressed = key, operator.compress(x)
    return held[1]


class LoRALinear(AdapterLinear):
    """``W + scale B A`` with A [r, in] and B [out, r]."""

    break_even = 1.5

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float | None, generator: torch.Generator, form: str = "auto"
    ) -> None:
        super().__init__(linear, form)
        self.rank, self.scale = rank, (rank if alpha is None else alpha) / rank
        dtype = linear.weight.dtype
        self.lora_A = nn.Parameter(self.fresh("lora_A", generator).to(dtype))
        self.lora_B = nn.Parameter(self.fresh("lora_B", generator).to(dtype))

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return ("lora_A", "lora_B")

    def delta_of(self, *parameters: Tensor) -> Tensor:
        A, B = parameters
        return self.scale * (B @ A)

    def fresh(self, name: str, generator: torch.Generator) -> Tensor:
        if name == "lora_B":
            return torch.zeros(self.out_features, self.rank)
        A = torch.empty(self.rank, self.in_features)
        return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)

    def singular_values(self, *parameters: Tensor) -> Tensor:
        A, B = parameters
        return torch.linalg.svdvals(self.scale * (torch.linalg.qr(B)[1] @ torch.linalg.qr(A.mT)[1].mT))

    def _merged(self, x: Tensor) -> Tensor:
        return _MergedLoRA.apply(x, self.weight, self.lora_A, self.lora_B, self.scale)

    def _decoupled(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"


class _MergedLoRA(torch.autograd.Function):
    """``x (W + scale B A)^T``; both gradients go through r features, none through [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, B, A, alpha=scale))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, weight, A, B = ctx.saved_tensors
        dy, scale = grads[0], ctx.scale
        dx = dy @ torch.addmm(weight, B, A, alpha=scale) if ctx.needs_input_grad[0] else None
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dA = scale * ((dy @ B).T @ x) if ctx.needs_input_grad[2] else None
        dB = scale * (dy.T @ (x @ A.T)) if ctx.needs_input_grad[3] else None
        return dx, None, dA, dB, None


def layer_generator(seed: int, layer: str, merges_done: int) -> torch.Generator:
    """The source of a layer's draws: the same on every rank, world size and resume."""
    return torch.Generator().manual_seed(derived_seed(seed, layer, merges_done))


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLinear]]:
    """The adapter layers by name, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            yield name, module


def adapter_parameters(model: nn.Module) -> set[str]:
    """The names of all adapters' trainable parameters."""
    return {f"{name}.{key}" for name, layer in adapter_layers(model) for key in layer.adapter_names}
