"""What an adapter layer is: a frozen weight and what trains beside it.

An adapter layer owns the frozen weight W [out, in] and its trainable parameters, and computes ``(W + delta) x``. Three
forms with the same result exist: ``merged`` builds ``W + delta`` for each use, which is one product with the tokens
instead of several passes over them; ``resident`` builds it once and keeps it until a weight changes; ``decoupled`` is
the textbook form, kept as the readable reference, and the one in which an adapter can have dropout.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.config.schema import MethodConfig
from relora_mora.operators import Draw
from relora_mora.system.seeds import derived_seed


class Flops(NamedTuple):
    """FLOPs of an adapter for one token, in forward alone and in forward and backward together."""

    forward: float
    both: float


class Kept(NamedTuple):
    """What a layer keeps of each token until its backward. ``shared``: layers with the same input keep one together."""

    what: str
    elements: int
    shared: bool


INPUT = "x"  # ``Kept.what`` of the layer's input itself
DROPPED = "dropped x"  # what dropout makes of it for one adapter


class AdapterLinear(nn.Module):
    """A linear layer whose weight is frozen and gets a trainable ``delta`` [out, in].

    A subclass says what its parameters are, what they add, and what that costs. Resetting, saving, exporting and
    planning need nothing else; merging.py knows MoRA's apart.

    Its parameters are matrices, and all that it has: a resume and an export make the layer without values and fill
    these in. What else it needs is calculated from the settings when it is used, and no buffer.
    """

    # tokens (in + out) / (in out) from which on the merged form takes less time, as measured (docs/method.md)
    break_even: ClassVar[float]
    # tensors [out, in] that exist at once while the merged form builds W + delta
    weights_built: ClassVar[int] = 1

    def __init__(self, linear: nn.Linear, form: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.form = form
        self.dropout = dropout
        self.resident = form == "resident"
        self.merged_weight: Tensor | None = None  # W + delta as it is now; never saved
        self.gathered = False  # ZeRO-3: its parameters are there while it runs, and only then
        self.in_place = False  # the weight itself is W + delta: at ZeRO-3, see zero/slices.py
        self.weight: Tensor = linear.weight
        self.weight.requires_grad_(False)
        self.bias: Tensor | None = linear.bias

    @classmethod
    @abstractmethod
    def from_settings(
        cls, linear: nn.Linear, method: MethodConfig, generator: torch.Generator, mora_type: int | None, draw: Draw
    ) -> Self:
        """The layer in place of a linear; ``generator`` gives its values, ``mora_type`` and ``draw`` its operator."""

    @classmethod
    def share_input(cls, layers: Sequence[Self]) -> None:
        """Told which layers of a model see the same input, in the order of their calls; a method may ignore it."""

    @classmethod
    @abstractmethod
    def parameters_for(cls, method: MethodConfig, in_features: int, out_features: int) -> int:
        """The number of trainable parameters beside a weight [out, in]."""

    @property
    @abstractmethod
    def adapter_names(self) -> tuple[str, ...]:
        """The names of the trainable parameters."""

    @abstractmethod
    def delta_of(self, *parameters: Tensor) -> Tensor:
        """What the adapter with these values (in the order of ``adapter_names``) adds to the weight [out, in]."""

    @abstractmethod
    def build_merged(self, weight: Tensor) -> Tensor:
        """weight + delta [out, in] of the present values, a new tensor; not differentiable"""

    @abstractmethod
    def fresh(self, name: str, generator: torch.Generator) -> Tensor:
        """The float32 value of one trainable parameter at the start of a cycle; they make a delta of zero."""

    @abstractmethod
    def singular_values(self, *parameters: Tensor) -> Tensor:
        """Singular values of ``delta_of(*parameters)``, without those that are zero by construction."""

    def as_lora(self, *parameters: Tensor) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] with ``delta_of(*parameters) = (alpha / r) B A``, as PEFT keeps a LoRA.

        alpha is ``method.lora_alpha`` where the adapter uses it, else r. None where an adapter is no LoRA.
        """
        return None

    @abstractmethod
    def flops(self, tokens: int, cycle: Sequence[int]) -> Flops:
        """The adapter's own matrix products for one of ``tokens`` tokens, averaged over the operators of ``cycle``."""

    @abstractmethod
    def kept(self, tokens: int, cycle: Sequence[int]) -> list[Kept]:
        """What stays of each of ``tokens`` tokens until backward, with the operator of ``cycle`` that needs most."""

    def _kept_by_dropout(self) -> list[Kept]:
        """What is multiplied with x to drop elements of it; on a GPU it takes a byte each."""
        return [Kept("kept by dropout", self.in_features, shared=False)] if self.drops else []

    @abstractmethod
    def _merged(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _delta(self, x: Tensor) -> Tensor:
        """x [..., in] -> ``delta x`` [..., out], without building ``delta``"""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        if self.multiplies_merged(x):
            y = self._merged(x)
        else:
            y = F.linear(x, self.weight) + self._delta(F.dropout(x, self.dropout) if self.drops else x)
        return y if self.bias is None else y + self.bias

    def multiplies_merged(self, x: Tensor) -> bool:
        """Whether x [..., in] is multiplied with ``W + delta``."""
        return self.in_place or self.uses_merged_form(x.numel() // self.in_features)

    @property
    def drops(self) -> bool:
        """Whether the adapter sees its input with elements dropped: in training, and nowhere else."""
        return self.training and self.dropout > 0

    @torch.no_grad()
    def keep_merged(self) -> None:
        """Builds ``W + delta`` where the layer is resident and has none; all uses until :meth:`drop_merged` take it."""
        if self.resident and self.merged_weight is None:
            self.merged_weight = self.build_merged(self.weight)

    def drop_merged(self) -> None:
        """To be called whenever W, the adapter or its operator changes. A use without it builds its own."""
        assert not self.in_place, "only what put W + delta in place of W has W"
        self.merged_weight = None

    @property
    def built(self) -> Tensor | None:
        """W + delta, where it is there already."""
        return self.weight if self.in_place else self.merged_weight

    def uses_merged_form(self, tokens: int) -> bool:
        """``auto`` builds ``W + delta`` where its [out, in] elements are few beside the tokens' [tokens, in + out].

        Not in training with dropout, where the adapter and the weight see different inputs.
        """
        if self.drops:
            return False
        if self.form == "auto":
            activations = tokens * (self.in_features + self.out_features)
            return activations >= self.break_even * self.in_features * self.out_features
        return self.form != "decoupled"

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"{self.in_features} -> {self.out_features}, form={self.form}{dropout}"


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


def effective_rank(singular_values: Tensor) -> Tensor:
    """[..., n] -> [...] exp of the entropy of the normalized singular values; 0 where all are 0

    Roy & Vetterli 2007, eq. 2-3.
    """
    values = singular_values.double()
    total = values.sum(-1, keepdim=True)
    entropy = torch.special.entr(values / total).sum(-1)
    return torch.where(total.squeeze(-1) > 0, torch.exp(entropy), 0.0)
