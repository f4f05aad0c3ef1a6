"""The activations and the arithmetic of one micro-batch, measured on fake tensors, which have shapes and no values.

The modules that train run forward and backward on one decoder layer of each kind, and again with one more layer of a
kind, whose bytes and FLOPs are the difference. Tensors are on the CPU, also if the run uses a GPU: both keep the same
tensors, and what differs is added here (the chunks of the loss) or left out (a mask that flash attention does without).
Keys and values that a GPU without flash attention repeats for grouped heads are not counted.

FLOPs: only matrix products and attention count; a multiplication and an addition are two FLOPs. Attention counts the
whole square of positions, as is usual (PaLM, arXiv 2204.02311, appendix B), although kernels skip the masked half and
compute scores again. The operators' sums and copies, norms, rotary embeddings and the optimizer are memory traffic.
"""

import copy
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.adapters.inject import decoder_layers
from relora_mora.adapters.layers import AdapterLinear, adapter_layers
from relora_mora.adapters.mora import set_operators
from relora_mora.config.registry import OPERATORS
from relora_mora.config.schema import Config
from relora_mora.model.causal import LossModel, put_values
from relora_mora.model.documents import flash_supports, head_width
from relora_mora.model.loss import bytes_per_logit, loss_chunk
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import meta_model

# matrix products by the position of their first factor; the next argument has the last size of the result
_PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "_int_mm", "_grouped_mm", "grouped_mm_fallback", "grouped_mm_fallback_backward"), 0),
    **dict.fromkeys(("addmm", "baddbmm"), 1),
}


@dataclass(frozen=True)
class Pass:
    """A micro-batch. Bytes: ``kept`` from forward to backward, ``most`` before the backward of the first layer,
    ``at_end`` from there on. FLOPs of a token: ``flops``, and what activation checkpointing computes a second time,
    which is not the model's arithmetic.
    """

    kept: float
    most: float
    at_end: float
    flops: float
    recomputed: float


@dataclass(frozen=True)
class _Seen:
    """What one small model showed. ``compiled``: the bytes that are kept if each layer is a compiled program."""

    kept: int
    compiled: int
    at_loss: int
    in_backward: int
    at_end: int
    forward_flops: float
    flops: float
    boundary: int  # bytes of the input of a layer
    fused: bool  # whether the loss is fused with the head


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages that operations allocate, and the most of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, Any] = {}  # weak references by the storage's address, which a later one may get
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out

    def add(self, tensor: Tensor) -> bool:
        """Counts a tensor's storage; returns whether it is a new one."""
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        if key in self.live:
            return False

        def freed(_: Any) -> None:
            del self.live[key]
            self.now -= size

        self.live[key] = weakref.ref(tensor.untyped_storage(), freed)
        self.now += size
        self.most = max(self.most, self.now)
        return True


@dataclass(eq=False)
class Made:
    """A storage that an operation made. Compiled programs keep its ``sources`` and compute it again, unless it is a
    factor of a product.
    """

    size: int
    sources: "set[Made]"
    multiplied: bool = False

    @property
    def kept(self) -> "set[Made]":
        """What compiled programs keep in its place."""
        return {self} if self.multiplied else self.sources


class Watch(LiveBytes):
    """Counts also FLOPs, and notes what a compiler would compute each storage from."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Made] = {}  # by address
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _grouped(*args) if func is _GROUPED else func(*args, **(kwargs or {}))
        flops = _flops(func, args)
        self.flops += flops
        given = [made for made in map(self.of, tree_iter((args, kwargs))) if made]
        sources: set[Made] = set()
        if flops or func.namespace == "relora_mora":
            for made in given:
                made.multiplied = True
        elif torch.Tag.nondeterministic_seeded not in func.tags:
            sources = sources.union(*(made.sources for made in given))
        for value in tree_iter(out):
            if isinstance(value, Tensor) and self.add(value):
                made = self.made[_key(value)] = Made(value.untyped_storage().nbytes(), sources)
                if not sources or size_of(sources) >= 1.5 * made.size:  # a sum of two is less than both
                    made.sources = {made}
        return out

    def of(self, value: Any) -> Made | None:
        return self.made.get(_key(value)) if isinstance(value, Tensor) and _key(value) in self.live else None


def size_of(made: set[Made]) -> int:
    return sum(each.size for each in made)


_GROUPED = torch.ops.aten._grouped_mm.default


def _grouped(a: Tensor, b: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    """The result of a product for each expert; torch knows its shape in bf16 only."""
    rows = (len(a),) if b.dim() == 3 else (len(offsets), len(a))
    return a.new_empty(*rows, b.shape[-1])


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _flops(func: Any, args: Any) -> float:
    name = func._overloadpacket.__name__
    backward = name.endswith("_backward")
    if name in _PRODUCTS:
        first, second = args[_PRODUCTS[name] :][:2]
        return (4.0 if backward else 2.0) * first.numel() * second.shape[-1]
    if name.startswith("_scaled_dot_product"):
        query, key, value = args[1:4] if backward else args[:3]
        return (4.0 if backward else 2.0) * query.shape[:3].numel() * key.shape[2] * (query.shape[3] + value.shape[3])
    return 0.0


def flops_per_token(model_config: PreTrainedConfig, config: Config) -> float:
    """FLOPs of one training token with these settings, without what is computed a second time."""
    return measure(meta_model(model_config, config.method), Setup(config, 0, 1, bf16=False)).flops


def measure(model: PreTrainedModel, setup: Setup) -> Pass:
    """Measures a model without values, with its adapters, forms and trainable parameters.

    With several operators: those that keep most, and the average of their FLOPs.
    """
    method = setup.config.method
    if not method.uses_squares:
        return _extrapolate(model, setup)
    codes = [OPERATORS[operator].code for operator in method.cycle]
    passes: dict[str, Pass] = {}
    for operator, code in zip(method.cycle, codes, strict=True):
        if code not in passes:
            set_operators(model, operator)
            passes[code] = _extrapolate(model, setup)
    set_operators(model, method.cycle[0])
    flops, recomputed = (fmean(getattr(passes[code], name) for code in codes) for name in ("flops", "recomputed"))
    return replace(max(passes.values(), key=lambda each: each.kept), flops=flops, recomputed=recomputed)


def _extrapolate(model: PreTrainedModel, setup: Setup) -> Pass:
    """Measures small models, and adds the layers that they lack."""
    kinds: dict[Any, list[int]] = defaultdict(list)
    layers = decoder_layers(model)
    types = getattr(model.config, "layer_types", None) or [None] * len(layers)
    for index, ((name, layer), attention) in enumerate(zip(layers, types, strict=True)):
        shapes = tuple((key, p.shape, p.requires_grad) for key, p in layer.named_parameters())
        resident = tuple(part.resident for part in layer.modules() if isinstance(part, AdapterLinear))
        kinds[name.rpartition(".")[0], attention, shapes, resident].append(index)
    firsts = [first for first, *_ in kinds.values()]
    base = _seen(model, setup, firsts)
    more = [_seen(model, setup, sorted([*firsts, first])) for first in firsts]
    checkpoints = setup.config.model.activation_checkpointing
    tokens = setup.config.tokens_per_micro_batch

    def each(what: str) -> list[float]:
        """Of one layer, by kind."""
        return [getattr(one, what) - getattr(base, what) for one in more]

    def together(what: str) -> float:
        """Of all layers."""
        return sum(size * len(indices) for size, indices in zip(each(what), kinds.values(), strict=True))

    kept_by_layers = "compiled" if setup.compiles else "kept"
    kept = base.kept - sum(each("kept"))  # what is not kept by layers
    kept += base.boundary * len(layers) if checkpoints else together(kept_by_layers)
    again = max(each(kept_by_layers)) if checkpoints else 0
    loss = base.at_loss - base.kept
    if setup.on_gpu and base.fused:
        loss = _loss_on_gpu(model.get_output_embeddings().weight, tokens, setup)
    return Pass(
        kept=kept,
        most=kept + max(loss, again + max(base.in_backward, base.at_end) - base.kept),
        at_end=base.at_end + max(each(kept_by_layers)) - max(each("kept")),
        flops=(base.flops - sum(each("flops")) + together("flops")) / tokens,
        recomputed=together("forward_flops") / tokens if checkpoints else 0.0,
    )


_KNOWN: dict[Any, _Seen] = {}


def _seen(model: PreTrainedModel, setup: Setup, chosen: Sequence[int]) -> _Seen:
    """What a run with some of the layers shows. Plans, and runs of one process, often ask for the same."""
    config = setup.config
    dtype = torch.bfloat16 if setup.bf16 else torch.float32
    gpu_without_mask = setup.on_gpu and flash_supports(head_width(model.config), dtype)
    masked = config.data.masks_documents and not gpu_without_mask
    eager = config.model.attention == "eager"
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    key = (
        model.config.to_json_string(),
        *((name, p.shape, p.requires_grad) for name, p in model.named_parameters()),
        *((str(layer), layer.resident, layer.stored) for _, layer in adapter_layers(model)),
        *(dtype, masked, eager, shape, *chosen),
    )
    if key not in _KNOWN:
        small = _with_layers(model, chosen)
        if eager:
            small.set_attn_implementation("eager")
        _KNOWN[key] = _run(small, dtype, shape, masked=masked)
    return _KNOWN[key]


def _run(lm: PreTrainedModel, dtype: torch.dtype, shape: tuple[int, int], *, masked: bool) -> _Seen:
    """Runs forward and backward of a small model."""
    watch = Watch()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        put_values(lm, {name: torch.empty(p.shape, dtype=dtype) for name, p in lm.named_parameters()})
        for _, adapter in adapter_layers(lm):
            adapter.pack()
            adapter.keep_merged()
            if adapter.merged_weight is not None:
                watch.add(adapter.merged_weight)
    trained = LossModel(lm)
    trained.train()
    for tensor in (*lm.parameters(), *lm.buffers()):
        watch.add(tensor)
    watch.now = watch.most = 0  # weights are counted elsewhere
    phases: list[int] = []
    boundaries: list[int] = []
    saved: set[Made] = set()

    def keep(tensor: Tensor) -> Tensor:
        if made := watch.of(tensor):
            saved.add(made)
        return tensor

    def next_phase(*_: Any) -> None:
        phases.append(watch.most)
        watch.most = watch.now

    def enter(_: Any, args: Any, given: Any) -> None:
        x = args[0] if args else given["hidden_states"]
        boundaries.append(x.nbytes)
        if made := watch.of(x):
            made.sources = {made}  # a compiled layer gets its input as it is

    def leave_first(_: Any, args: Any, out: Any) -> None:
        (out if isinstance(out, Tensor) else out[0]).register_hook(next_phase)

    layers = [layer for _, layer in decoder_layers(lm)]
    for layer in layers:
        layer.register_forward_pre_hook(enter, with_kwargs=True)
    layers[0].register_forward_hook(leave_first)
    # as if the embeddings trained, without their gradient
    lm.get_input_embeddings().register_forward_hook(
        lambda _, args, out: out.detach() + torch.zeros((), requires_grad=True)
    )
    for parameter in lm.parameters():
        if parameter is not lm.get_output_embeddings().weight and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget)  # the gradients are counted elsewhere
    with fake, watch:
        ids = torch.zeros(shape, dtype=torch.int64)
        documents = torch.zeros(2, dtype=torch.int32) if masked else None
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trained(ids, ids, documents, float(ids.numel()))
        kept, forward_flops = watch.now, watch.flops
        next_phase()
        loss.backward(torch.tensor(1.0))  # a number that the loss can read
    next_phase()
    at_loss, in_backward, at_end = phases
    return _Seen(
        kept=kept,
        compiled=kept - size_of(saved) + size_of(set().union(*(made.kept for made in saved))),
        at_loss=at_loss,
        in_backward=in_backward,
        at_end=at_end,
        forward_flops=forward_flops,
        flops=watch.flops,
        boundary=max(boundaries),
        fused=trained.scale is not None,
    )


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _loss_on_gpu(head: Tensor, tokens: int, setup: Setup) -> int:
    """Bytes that the fused loss takes on a GPU above what it keeps (``model/loss.py``)."""
    dtype = torch.bfloat16 if setup.bf16 else torch.float32
    trains = head.numel() if head.requires_grad else 0
    logit = bytes_per_logit(dtype, in_place=True)
    chunk = min(tokens, loss_chunk(tokens, len(head), logit, on_gpu=True))
    return max(chunk * len(head) * logit + 4 * trains, (4 + logit) * trains) - logit * trains


def _with_layers(model: PreTrainedModel, chosen: Sequence[int]) -> PreTrainedModel:
    """A copy with only these decoder layers, some of them several times."""
    layers = decoder_layers(model)
    # a layer in the second argument counts as copied
    small = copy.deepcopy(model, {id(layer): layer for _, layer in layers})
    for container in {name.rpartition(".")[0] for name, _ in layers}:
        some = [layers[index][1] for index in chosen if layers[index][0].rpartition(".")[0] == container]
        copies = [copy.deepcopy(layer, {id(model.config): small.config}) for layer in some]
        small.get_submodule(container)._modules = {str(index): layer for index, layer in enumerate(copies)}
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = [small.config.layer_types[index] for index in chosen]
    small.config.num_hidden_layers = len(chosen)
    return small
