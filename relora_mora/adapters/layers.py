"""The base class of adapter layers: a frozen weight plus trainable parameters.

An adapter layer owns the frozen weight W [out, in] and its trainable parameters, and computes ``(W + delta) x``. It has
three forms with the same result. ``merged`` builds ``W + delta`` for each use, so the tokens need one product instead
of several passes. ``resident`` builds it once and keeps it until a weight changes. ``decoupled`` is the textbook form:
the readable reference, and the only form that allows dropout.
"""

from abc import abstractmethod
from collections.abc import Iterator, KeysView, Sequence
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_mora.adapters.scope import Caller
from relora_mora.adapters.stored import PLAIN, EightBits, Stored
from relora_mora.config.schema import MethodConfig
from relora_mora.system.seeds import derived_seed

ADAPTERS = "adapters"  # their group in an optimizer
HOST: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


class AdapterLinear(nn.Module):
    """A linear layer with a frozen weight and a trainable ``delta`` [out, in] that is added to it.

    A subclass defines its parameters and their delta. Resetting, saving, exporting and planning need
    nothing else; only ``engine/merging.py`` treats MoRA specially.

    All its state is in its parameters, which are matrices: a resume or an export builds the layer without values and
    fills them in. Anything else is computed from the settings when needed, and there are no buffers.
    """

    # the merged form is faster if tokens * (in + out) / (in * out) is at least this, as measured (docs/method.md)
    break_even: ClassVar[float]

    def __init__(
        self, linear: nn.Linear, method: MethodConfig, generator: torch.Generator, mora_type: int | None = None
    ) -> None:
        """Takes the weight of ``linear``; draws initial values from ``generator``.

        ``mora_type`` is the operator, if the adapter has one (default: the first of the cycle).
        """
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.form = method.form
        self.dropout = method.dropout
        self.resident = method.form == "resident"
        self.merged_weight: Tensor | None = None  # the current W + delta; never saved
        self.stored: Stored = PLAIN  # how W is stored, and the resident W + delta too
        self.name = ""  # in the model, for messages
        self.callers: tuple[Caller, ...] = ()  # the modules around this one, innermost first; see weight
        self.register_parameter("weight", cast(nn.Parameter, linear.weight))
        self.bias: Tensor | None = linear.bias

    @classmethod
    def share_input(cls, parent: nn.Module, layers: Sequence[Self]) -> None:
        """Called with the layers in ``parent``, some of which may see the same input. A subclass may ignore it."""

    @property
    @abstractmethod
    def adapter_names(self) -> tuple[str, ...]:
        """The names of the trainable parameters."""

    @abstractmethod
    def delta_of(self, *parameters: Tensor) -> Tensor:
        """The delta [out, in] of an adapter with these values, in the order of ``adapter_names``."""

    @property
    @abstractmethod
    def algebra(self) -> Any:
        """The part of the adapter's arithmetic that is not left to autograd: an ``Operator`` or a ``LowRank``.

        ``add_delta(weight [out, in], *parameters, after)`` returns weight + delta, a new tensor; ``ops.expand_add`` has
        ``after``. ``gradients(kept, dy [..., out], *parameters)`` returns the gradients of the parameters; ``kept`` is
        what :meth:`_for_gradients` returned.
        """

    @abstractmethod
    def fresh(self, name: str, generator: torch.Generator) -> Tensor:
        """The float32 value of a parameter at the start of a cycle. Fresh parameters have a delta of zero."""

    @abstractmethod
    def singular_values(self, *parameters: Tensor) -> Tensor:
        """Singular values of ``delta_of(*parameters)``, without those that are zero by construction."""

    @abstractmethod
    def as_lora(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] with ``delta_of(*parameters) = (alpha / r) B A``, the way PEFT stores a LoRA.

        alpha is ``method.lora_alpha`` if the adapter uses it, else r.
        """

    @abstractmethod
    def _delta(self, x: Tensor) -> Tensor:
        """x [..., in] -> ``delta x`` [..., out], without building ``delta``"""

    @property
    def base_weight(self) -> Tensor:
        """The frozen W [out, in] as it is stored; the layer's own code reads only this."""
        return cast(Tensor, self._parameters["weight"])

    @property
    def weight(self) -> Tensor:
        """W [out, in] as it is stored. In a forward of the model: ``W + delta``, which trains the adapter.

        Some models multiply with the weights of their linears themselves, such as ``nn.MultiheadAttention`` or a tied
        decoder. The forward counts from the call of a module around this layer; see :class:`Caller`. In a backward,
        gradient checkpointing may run a part of a forward again, without its module.
        """
        if "weight" not in self._parameters:
            raise AttributeError("weight")  # while the layer is built
        for caller in self.callers:
            if caller.depth:
                return self._merged_for(caller)
        if self.callers and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return self._merged_for(None)
        return self.base_weight

    def _merged_for(self, caller: Caller | None) -> Tensor:
        assert self.stored == PLAIN
        parameters = [getattr(self, name).float() for name in self.adapter_names]  # plain tensors in functional_call
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):  # or nobody could see that it is written to
            weight = (self.base_weight.float() + self.delta_of(*parameters)).to(self.base_weight.dtype)
        if caller is not None and not torch.compiler.is_compiling():
            caller.read.append((self.name, weight, weight._version))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]

        The products are in the dtype of x, or of autocast. W and the adapter may have others.
        """
        if not x.is_floating_point():
            raise TypeError(f"an adapter layer, as nn.Linear, needs an input of floating-point numbers, got {x.dtype}")
        device = x.device.type
        if torch.is_autocast_enabled(device):  # it would cast in forward, but not in the backward of the merged form
            with torch.autocast(device, enabled=False):
                return self.forward(x.to(torch.get_autocast_dtype(device)))
        y = self._merged(x) if self.uses_merged_form(x.numel() // self.in_features) else self._decoupled(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _merged(self, x: Tensor) -> Tensor:
        parameters = [getattr(self, name) for name in self.adapter_names]
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        kept = self._for_gradients(x) if trains else None
        return FrozenProduct.apply(
            x, self.base_weight, self.merged_weight, self.stored, self.algebra, kept, *parameters
        )

    def _for_gradients(self, x: Tensor) -> Tensor:
        """What the gradients of :attr:`algebra` need of x."""
        return x.detach()  # torch's compiler cannot pass one tensor to a function twice

    def _decoupled(self, x: Tensor) -> Tensor:
        """x [..., in] -> ``W x + delta x`` [..., out], with dropout of the second x"""
        if self.stored == PLAIN:
            base = self.stored.linear(x, self.base_weight)
        else:
            base = FrozenProduct.apply(x, None, self.base_weight, self.stored, self.algebra, None)
        return base + self._delta(F.dropout(x, self.dropout) if self.drops else x)

    @property
    def drops(self) -> bool:
        """Whether dropout applies to the adapter's input, which it does only in training."""
        return self.training and self.dropout > 0

    @torch.no_grad()
    def keep_merged(self) -> None:
        """Builds ``W + delta`` if the layer is resident and has none. It is used until :meth:`drop_merged`."""
        if self.resident and self.merged_weight is None:
            weight = self.stored.dense(self.base_weight, torch.float32)
            self.merged_weight = self.stored.encode(self.build_merged(weight))

    def build_merged(self, weight: Tensor) -> Tensor:
        """weight + delta [out, in] with the current values, a new tensor; not differentiable"""
        return _add_delta(self.algebra, weight, [getattr(self, name) for name in self.adapter_names])

    def drop_merged(self) -> None:
        """Must be called whenever W, the adapter or its operator changes."""
        self.merged_weight = None

    def uses_merged_form(self, tokens: int) -> bool:
        """``auto`` builds ``W + delta`` if it has few elements compared to the activations [tokens, in + out].

        If products are in 8 bits, ``auto`` uses ``W + delta`` only if it is resident, because rounding it for each use
        takes longer than the decoupled form. Never in training with dropout, since the adapter and the weight then see
        different inputs.
        """
        if self.drops or torch.jit.is_tracing():  # a trace has no functions that only Python knows
            return False
        if self.form == "auto" and self.stored.multiplies:
            return self.resident
        if self.form == "auto":
            activations = tokens * (self.in_features + self.out_features)
            return activations >= self.break_even * self.in_features * self.out_features
        return self.form != "decoupled"

    def pack(self, *, empty: bool = False) -> None:
        """Stores W as ``stored`` says from now on. In 8 bits the parameter ``weight`` becomes a tensor of bytes.

        ``empty``: the values will be written later.
        """
        if isinstance(self.stored, EightBits) and self.base_weight.dtype != torch.uint8:
            change = self.stored.empty if empty else self.stored.encode
            packed = change(self.base_weight.detach())
            self.register_parameter("weight", nn.Parameter(packed, requires_grad=False))

    def _replicate_for_data_parallel(self) -> Self:
        raise RuntimeError(
            "nn.DataParallel does not support adapter layers; use DistributedDataParallel (torchrun), or show one GPU "
            "to this process (CUDA_VISIBLE_DEVICES=0)"
        )

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"{self.in_features} -> {self.out_features}, form={self.form}{dropout}"


class FrozenProduct(torch.autograd.Function):
    """``x (W + delta)^T``, where W does not train: (x, weight, ready, stored, algebra, kept, *parameters) -> y

    ``ready`` is the stored matrix to multiply with, if there is one: W itself, or a resident ``W + delta``. Otherwise
    the sum of the stored ``weight`` and delta is built in forward and again in backward. ``kept`` is what the gradients
    of the parameters need of x, or None if they do not train.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        # not named in the signature: torch's compiler takes one with as many names as inputs for one without ctx
        x, weight, ready, stored, algebra, kept, *parameters = given
        ctx.save_for_backward(weight, ready, kept, *parameters)
        ctx.stored = stored
        ctx.algebra = algebra
        y: Tensor
        if ready is not None:
            y = stored.linear(x, ready)
        else:
            y = F.linear(x, _add_delta(algebra, stored.dense(weight, x.dtype), parameters).to(x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        weight, ready, kept, *parameters = ctx.saved_tensors
        dy = grads[0]
        dx = None
        if ctx.needs_input_grad[0] and ready is not None:
            dx = ctx.stored.linear_transposed(dy, ready)
        elif ctx.needs_input_grad[0]:
            dense = ctx.stored.dense(weight, dy.dtype, after=dy)
            dx = dy @ _add_delta(ctx.algebra, dense, parameters, after=dy).to(dy.dtype)
        gradients = [None] * len(parameters) if kept is None else ctx.algebra.gradients(kept, dy, *parameters)
        return dx, None, None, None, None, None, *gradients


def _add_delta(algebra: Any, weight: Tensor, parameters: Sequence[Tensor], after: Tensor | None = None) -> Tensor:
    total: Tensor = algebra.add_delta(weight, *(parameter.to(weight.dtype) for parameter in parameters), after=after)
    return total


def refuse_second_derivatives() -> None:
    """Called in the backward of a function that computes no graph of itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # autograd was called with create_graph
        raise RuntimeError(
            "the merged form of an adapter and weights in 8 bits have no second derivatives; use the form decoupled, "
            "and weights that are not in 8 bits"
        )


def layer_generator(seed: int, layer: str, merges_done: int) -> torch.Generator:
    """The random generator of a layer: the same on every rank, world size and resume."""
    return torch.Generator().manual_seed(derived_seed(seed, layer, merges_done))


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLinear]]:
    """The adapter layers with their names, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            yield name, module


def all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The names of each module: several, if a model uses one module in several places."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def adapter_parameters(model: nn.Module) -> KeysView[str]:
    """The names of all adapters' trainable parameters, in the order of the model."""
    return dict.fromkeys(f"{name}.{key}" for name, layer in adapter_layers(model) for key in layer.adapter_names).keys()


def effective_rank(singular_values: Tensor) -> Tensor:
    """[..., n] -> [...]: exp of the entropy of the normalized singular values, or 0 if all are 0

    Roy & Vetterli 2007, eq. 2-3.
    """
    values = singular_values.double()
    total = values.sum(-1, keepdim=True)
    entropy = torch.special.entr(values / total).sum(-1)
    return torch.where(total.squeeze(-1) > 0, torch.exp(entropy), 0.0)
