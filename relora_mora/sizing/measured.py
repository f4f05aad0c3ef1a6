"""What a decoder layer needs, measured: the layers that train run forward and backward on tensors without memory.

Fake tensors have shapes and dtypes but no values, so layers of any size take a fraction of a second. Two layers run.
Each further layer needs as much as the second one; the first one also keeps what all layers share. They run as on a
CPU. A GPU keeps the same for backward, except that attention without a flash kernel gets repeated keys and values
there, as with a mask on a CPU, and that products in fp8 need no float32 copies, just as those in int8.
"""

import copy
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.adapters.inject import decoder_linears, inject
from relora_mora.adapters.layers import AdapterLinear, adapter_layers
from relora_mora.adapters.mora import set_operators
from relora_mora.adapters.stored import EightBits
from relora_mora.config.registry import OPERATORS
from relora_mora.config.schema import MethodConfig
from relora_mora.model.config import head_width
from relora_mora.model.llama import LossModel, flash_supports, model_class, put_values
from relora_mora.optim.groups import set_trainable
from relora_mora.sizing.setup import Setup

_ATEN = torch.ops.aten
_LINEAR = (_ATEN.mm, _ATEN.addmm, _ATEN._int_mm)
_FLOPS = flop_registry | {
    _ATEN._int_mm: flop_registry[_ATEN.mm],
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _attention(q, k),
    # without the scores, which the kernel computes again
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: 2 * _attention(q, k),
}


def _attention(query: Tensor, key: Tensor) -> int:
    """FLOPs of attention of query [B, heads, T, D] to as many features of values as of keys [B, fewer heads, T, D]"""
    return 4 * query.numel() * key.shape[-2]


@dataclass(frozen=True)
class Layer:
    """What one decoder layer needs: bytes for a micro-batch, FLOPs for a token."""

    kept: float  # by forward for backward
    ends: float  # outside of the layers: by the final norm, with its output and the gradient of that
    mask: float  # of attention, shared by all layers
    scratch: float  # that backward needs in addition to what is kept
    forward: float
    flops: float  # forward and backward
    attention: float  # the share of ``flops`` that is in attention


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token, forward and backward. Only matrix products count; a multiplication and an addition are two.

    Attention counts the whole square of positions, as is usual (PaLM, arXiv 2204.02311, appendix B), although kernels
    skip the masked half. What is computed once a step is not counted. ``recomputed`` is what activation checkpointing
    computes a second time. The devices do this work, but "model FLOPs utilization" leaves it out.
    """

    linears: float
    adapters: float
    attention: float
    head: float
    recomputed: float

    @property
    def total(self) -> float:
        return self.linears + self.adapters + self.attention + self.head

    @property
    def performed(self) -> float:
        return self.total + self.recomputed


def meta_model(model_config: PreTrainedConfig, method: MethodConfig) -> PreTrainedModel:
    """Builds the model with adapters and marked trainable parameters on the meta device, which takes no memory."""
    with torch.device("meta"):
        model = model_class(model_config)(model_config)
        if method.uses_adapters:
            inject(model, method, seed=0)
    set_trainable(model, method)
    return model


def flops_of(model: PreTrainedModel, setup: Setup) -> Flops:
    """FLOPs of one token for a model that has its adapters, their forms, and its trainable parameters marked."""
    layer = measure(model, setup)
    layers = model.config.num_hidden_layers
    linears = sum(
        2.0 * linear.in_features * linear.out_features * (3 if linear.weight.requires_grad else 2)
        for _, linear in decoder_linears(model)
    )
    head = model.config.vocab_size * model.config.hidden_size
    return Flops(
        linears=linears,
        adapters=layers * (layer.flops - layer.attention) - linears,
        attention=layers * layer.attention,
        head=2.0 * head * (3 if model.get_output_embeddings().weight.requires_grad else 2),
        recomputed=layers * layer.forward if setup.config.model.activation_checkpointing else 0.0,
    )


def measure(model: PreTrainedModel, setup: Setup) -> Layer:
    """What a layer of the model needs: of the operators in its cycle, the most memory and the average work.

    Operators of one class need the same.
    """
    cycle = setup.config.method.cycle
    like = {OPERATORS[operator].code: operator for operator in reversed(cycle)}
    found = [_remembered(model, setup, like[OPERATORS[operator].code]) for operator in cycle]
    if not cycle:
        found = [_remembered(model, setup, None)]
    return replace(
        max(found, key=lambda layer: layer.kept),
        scratch=max(layer.scratch for layer in found),
        forward=fmean(layer.forward for layer in found),
        flops=fmean(layer.flops for layer in found),
    )


_measured: dict[str, Layer] = {}


def _remembered(model: PreTrainedModel, setup: Setup, operator: int | None) -> Layer:
    """What a layer needs with one operator; equal layers are measured once."""
    first = model.model.layers[0]
    of_layer: list[Any] = [repr(first), [parameter.requires_grad for parameter in first.parameters()], operator]
    of_layer += [(layer.resident, layer.stored) for _, layer in adapter_layers(first)]
    data = setup.config.data
    of_setup: list[Any] = [setup.bf16, setup.on_gpu, setup.config.train.micro_batch_size, data.sequence_length]
    of_setup += [setup.config.model.attention, data.masks_documents]
    key = f"{of_layer} {of_setup} {model.config.to_json_string()}"
    if key not in _measured:
        _measured[key] = _run(model, setup, operator)
    return _measured[key]


def _run(model: PreTrainedModel, setup: Setup, operator: int | None) -> Layer:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    two = _two_layers(model, setup, operator, fake)
    body = LossModel(two).train()
    has_mask, repeats_keys = _masks(model, setup)
    tracker = LiveTensors()
    weights = [parameter.data for parameter in two.parameters()]
    merged = [layer.merged_weight for _, layer in adapter_layers(two) if layer.merged_weight is not None]
    for tensor in weights + merged:
        tracker.add(tensor)
    before = tracker.now
    after_layers: list[int] = []
    for layer in two.model.layers:
        layer.register_forward_hook(lambda *_: after_layers.append(tracker.now))
    with fake, tracker:
        ids = torch.zeros(setup.config.train.micro_batch_size, setup.config.data.sequence_length, dtype=torch.int64)
        boundaries = torch.zeros(2, dtype=torch.int32) if has_mask or repeats_keys else None
        hidden = body.hidden(ids, boundaries)
        gradient = torch.empty_like(hidden)
        forward = tracker.flops.total()
        at_end = tracker.most = tracker.now
        hidden.backward(gradient)
    one, both = after_layers
    mask = ids.numel() * ids.shape[1] * setup.width
    tokens = 2 * ids.numel()  # of two layers
    return Layer(
        kept=both - one,
        ends=at_end - before - 2 * (both - one) - (0 if boundaries is None else mask),
        mask=mask if has_mask else 0,
        scratch=tracker.most - at_end,
        forward=forward / tokens,
        flops=tracker.flops.total() / tokens,
        attention=sum(flops for operation, flops in tracker.flops.items() if operation not in _LINEAR) / tokens,
    )


def _two_layers(model: PreTrainedModel, setup: Setup, operator: int | None, fake: FakeTensorMode) -> PreTrainedModel:
    """The model with two layers, on fake tensors. Gradients of parameters are dropped, as they are counted apart."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 2
    two = meta_model(config, setup.config.method)
    two.config._attn_implementation = "eager" if setup.config.model.attention == "eager" else "sdpa"
    two.model.rotary_emb = type(two.model.rotary_emb)(config=config)  # computes its buffers, which are not fake
    two.model.embed_tokens.requires_grad_()  # so that both layers compute gradients of their inputs
    for name, linear in decoder_linears(two):
        like: Any = model.get_submodule(name.replace(".layers.1.", ".layers.0."))
        linear.weight.requires_grad_(like.weight.requires_grad)
        if isinstance(linear, AdapterLinear):
            is_cast = isinstance(like.stored, EightBits) and setup.on_gpu
            linear.stored = replace(like.stored, kind="int8") if is_cast else like.stored
            linear.resident = like.resident
    set_operators((layer for _, layer in adapter_layers(two)), operator)
    dtype = torch.bfloat16 if setup.bf16 else torch.float32
    with fake:
        put_values(two, {name: torch.empty(p.shape, dtype=dtype) for name, p in two.named_parameters()})
        for _, layer in adapter_layers(two):
            layer.pack()
            layer.keep_merged()
    for parameter in two.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    return two


def _masks(model: PreTrainedModel, setup: Setup) -> tuple[bool, bool]:
    """Whether attention gets a mask [T, T] of each sequence, and whether it gets repeated keys without one."""
    attention = setup.config.model.attention
    fused = setup.on_gpu and attention == "sdpa"
    flash = fused and flash_supports(head_width(model.config), torch.bfloat16 if setup.bf16 else torch.float32)
    return attention == "eager" or (setup.config.data.masks_documents and not flash), fused and not flash


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live storages that operations allocate, their maximum, and FLOPs by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, Any] = {}
        self.now = self.most = 0
        self.flops: Counter[Any] = Counter()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def _drop(self, key: int, size: int) -> None:
        if self.live.pop(key, None) is not None:
            self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        if operation in _FLOPS:
            self.flops[operation] += _FLOPS[operation](*args, **(kwargs or {}), out_val=out)
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out
