"""The activations and the arithmetic of one micro-batch, measured on fake tensors, which have shapes and no values.

The modules that train run forward and backward on one decoder layer of each kind, and again with one more layer of a
kind, whose bytes and FLOPs are the difference. Tensors are on the CPU, also if the run uses a GPU: both keep the same
tensors, and what differs is added here (the chunks of the loss) or left out (a mask that flash attention does without).

FLOPs: only matrix products and attention count; a multiplication and an addition are two FLOPs. Attention counts the
whole square of positions, as is usual (PaLM, arXiv 2204.02311, appendix B), although kernels skip the masked half and
compute scores again. The operators' sums and copies, norms, rotary embeddings and the optimizer are memory traffic.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
class Flops:
    """FLOPs of one token, forward and backward.

    ``recomputed`` is what activation checkpointing computes a second time. The devices do this work, but it does not
    belong to the model's arithmetic, so "model FLOPs utilization" leaves it out.
    """

    total: float
    recomputed: float

    @property
    def performed(self) -> float:
        return self.total + self.recomputed


@dataclass(frozen=True)
class Pass:
    """Bytes of one micro-batch: kept from forward to backward, and the most at once, including these.

    ``at_end``: the most in the backward of the first layer. ``layer``: what one layer keeps, the largest.
    """

    kept: float
    at_loss: float
    in_backward: float
    at_end: float
    layer: float
    flops: Flops


@dataclass(frozen=True)
class _Seen:
    """What one small model showed. ``compiled``: the bytes that are kept if each layer is a compiled program."""

    kept: int
    compiled: int
    at_loss: int
    in_backward: int
    at_end: int
    flops: float
    forward: float
    boundary: int  # bytes of the input of a layer
    passed: int  # bytes that all layers get, such as a mask, and that no layer keeps
    fused: bool  # whether the loss is fused with the head


_KNOWN: dict[Any, _Seen] = {}


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


class Watch(LiveBytes):
    """Counts also FLOPs, and notes what a compiler would compute each storage from."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.numbers: dict[int, int] = {}  # of storages, by address
        self.sizes: list[int] = []
        self.sources: list[set[int]] = []
        self.multiplied: set[int] = set()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _grouped(*args) if func is _GROUPED else func(*args, **(kwargs or {}))
        flops = _flops(func, args)
        self.flops += flops
        tensors = (value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor))
        given = {number for tensor in tensors if (number := self.number(tensor)) is not None}
        sources: set[int] = set()
        if flops or func.namespace == "relora_mora":
            self.multiplied |= given
        elif torch.Tag.nondeterministic_seeded not in func.tags:
            sources = sources.union(*(self.sources[number] for number in given))
        for value in tree_iter(out):
            if isinstance(value, Tensor) and _key(value) not in self.known and self.add(value):
                size = value.untyped_storage().nbytes()
                number = self.numbers[_key(value)] = len(self.sizes)
                self.sizes.append(size)
                computed = sources and self.bytes_of(sources) < 1.5 * size  # a sum of two is less than both
                self.sources.append(sources if computed else {number})
        return out

    def number(self, tensor: Tensor) -> int | None:
        return self.numbers[_key(tensor)] if _key(tensor) in self.live else None

    def bytes_of(self, numbers: set[int]) -> int:
        return sum(self.sizes[number] for number in numbers)

    def compiled(self, saved: set[int]) -> set[int]:
        """What compiled programs keep of these: they compute again what is not a product, and no product's input."""
        return set().union(*({each} if each in self.multiplied else self.sources[each] for each in saved))


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


def flops_per_token(model_config: PreTrainedConfig, config: Config) -> Flops:
    """FLOPs of one training token with these settings."""
    return measure(meta_model(model_config, config.method), Setup(config, 0, 1, bf16=False)).flops


def measure(model: PreTrainedModel, setup: Setup) -> Pass:
    """Measures a model without values, with its adapters, forms and trainable parameters.

    With several operators: those that keep most, and the average of their FLOPs.
    """
    method = setup.config.method
    cycle = method.cycle if method.uses_squares else (None,)
    layers = [layer for _, layer in adapter_layers(model)]
    known: dict[str, Pass] = {}
    passes = []
    for kind in cycle:
        code = OPERATORS[kind].code if kind else ""
        if code not in known:
            set_operators(layers, kind)
            known[code] = _extrapolate(model, setup)
        passes.append(known[code])
    set_operators(layers, cycle[0])
    flops = [each.flops for each in passes]
    mean = Flops(*(sum(getattr(each, key) for each in flops) / len(flops) for key in ("total", "recomputed")))
    return replace(max(passes, key=lambda each: each.kept), flops=mean)


def _extrapolate(model: PreTrainedModel, setup: Setup) -> Pass:
    kinds: dict[Any, list[int]] = {}
    layers = decoder_layers(model)
    types = getattr(model.config, "layer_types", None) or [None] * len(layers)
    for index, ((name, layer), attention) in enumerate(zip(layers, types, strict=True)):
        shapes = tuple((key, p.shape, p.requires_grad) for key, p in layer.named_parameters())
        resident = tuple(part.resident for part in layer.modules() if isinstance(part, AdapterLinear))
        kinds.setdefault((name.rpartition(".")[0], attention, shapes, resident), []).append(index)
    firsts = [indices[0] for indices in kinds.values()]
    base = _seen(model, setup, firsts)
    counts = [len(indices) for indices in kinds.values()]
    more = [_seen(model, setup, sorted([*firsts, first])) for first in firsts]

    def each(key: str) -> list[float]:
        """By kind, of one layer."""
        return [getattr(one, key) - getattr(base, key) for one in more]

    def together(key: str) -> float:
        """Of all layers."""
        return sum(size * count for size, count in zip(each(key), counts, strict=True))

    tokens = setup.config.tokens_per_micro_batch
    ends = base.kept - sum(each("kept"))  # bytes that are not kept by layers
    repeated = _repeated(model, setup)
    of_layers = "compiled" if setup.compiles else "kept"
    if setup.config.model.activation_checkpointing:
        kept, again = ends + base.passed + base.boundary * len(layers), max(each(of_layers)) + repeated
    else:
        kept, again = ends + together(of_layers) + repeated * len(layers), 0.0
    loss = base.at_loss - base.kept
    if setup.on_gpu and base.fused:
        loss = _loss_on_gpu(model.get_output_embeddings().weight, tokens, setup)
    return Pass(
        kept=kept,
        at_loss=kept + loss,
        in_backward=kept + again + max(base.in_backward, base.at_end) - base.kept,
        at_end=base.at_end + max(each(of_layers)) - max(each("kept")) + repeated,
        layer=max(each(of_layers)) + repeated,
        flops=Flops(
            (base.flops - sum(each("flops")) + together("flops")) / tokens,
            together("forward") / tokens if setup.config.model.activation_checkpointing else 0.0,
        ),
    )


def _repeated(model: PreTrainedModel, setup: Setup) -> int:
    """Bytes of the keys and values that attention without a mask repeats in a layer on a GPU, if it is not flash."""
    config = setup.config
    flash = flash_supports(head_width(model.config), torch.bfloat16 if setup.bf16 else torch.float32)
    if not setup.on_gpu or flash or config.data.masks_documents or config.model.attention == "eager":
        return 0
    heads = getattr(model.config, "num_attention_heads", 0)
    fewer = heads - (getattr(model.config, "num_key_value_heads", None) or heads)
    return 2 * fewer * head_width(model.config) * setup.width * config.tokens_per_micro_batch


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
        _KNOWN[key] = _run(_with_layers(model, chosen), dtype, shape, masked=masked, eager=eager)
    return _KNOWN[key]


def _run(lm: PreTrainedModel, dtype: torch.dtype, shape: tuple[int, int], *, masked: bool, eager: bool) -> _Seen:
    """Runs forward and backward of a small model."""
    if eager:
        lm.set_attn_implementation("eager")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        put_values(lm, {name: torch.empty(p.shape, dtype=dtype) for name, p in lm.named_parameters()})
        for _, adapter in adapter_layers(lm):
            adapter.pack()
            adapter.keep_merged()
    trained = LossModel(lm)
    trained.train()
    head = lm.get_output_embeddings().weight
    known = {_key(tensor) for tensor in (*lm.parameters(), *lm.buffers())}
    known |= {_key(adapter.merged_weight) for _, adapter in adapter_layers(lm) if adapter.merged_weight is not None}
    watch = Watch(known)
    boundaries: list[int] = []
    passed: dict[int, int] = {}  # sizes of the other arguments of layers
    for _, layer in decoder_layers(lm):
        layer.register_forward_pre_hook(
            lambda _, args, given: _mark(watch, boundaries, passed, args, given), with_kwargs=True
        )
    decoder_layers(lm)[0][1].register_forward_hook(lambda _, args, out: ends_with(out))
    # as if the embeddings trained, without their gradient
    lm.get_input_embeddings().register_forward_hook(
        lambda _, args, out: out.detach() + torch.zeros((), requires_grad=True)
    )
    for parameter in lm.parameters():
        if parameter is not head and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget)  # the gradients are counted elsewhere
    saved: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if (number := watch.number(tensor)) is not None:
            saved.add(number)
        return tensor

    phases: list[int] = []

    def ends_with(out: Any) -> None:
        """Lets the backward of the first layer be a phase of its own."""
        (out if isinstance(out, Tensor) else out[0]).register_hook(lambda _: next_phase())

    def next_phase() -> None:
        phases.append(watch.most)
        watch.most = watch.now

    with fake, watch:
        ids = torch.zeros(shape, dtype=torch.int64)
        documents = torch.zeros(2, dtype=torch.int32) if masked else None
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trained(ids, ids, documents, float(ids.numel()))
        kept, forward = watch.now, watch.flops
        next_phase()
        loss.backward(torch.tensor(1.0))  # a number that the loss can read
    next_phase()
    compiled = kept - watch.bytes_of(saved) + watch.bytes_of(watch.compiled(saved))
    at_loss, in_backward, at_end = phases
    return _Seen(
        *(kept, compiled, at_loss, in_backward, at_end, watch.flops, forward),
        boundary=max(boundaries),
        passed=sum(size for number, size in passed.items() if number not in saved),
        fused=trained.scale is not None,
    )


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _mark(watch: Watch, sizes: list[int], passed: dict[int, int], args: Any, given: Any) -> None:
    """Notes the input of a layer, which a compiled layer gets as it is, and what else it is given."""
    x = args[0] if args else given["hidden_states"]
    sizes.append(x.nbytes)
    if (number := watch.number(x)) is not None:
        watch.sources[number] = {number}
    for value in tree_iter((args, given)):
        if isinstance(value, Tensor) and value is not x and (number := watch.number(value)) is not None:
            passed[number] = value.nbytes


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
    lists: dict[str, list[int]] = {}
    for index, (name, _) in enumerate(layers):
        lists.setdefault(name.rpartition(".")[0], []).append(index)
    whole = {name: model.get_submodule(name)._modules for name in lists}
    try:
        for name, inside in lists.items():
            some = [layers[index][1] for index in chosen if index in inside]
            model.get_submodule(name)._modules = dict(zip(map(str, range(len(some))), some, strict=True))
        small = copy.deepcopy(model)
    finally:
        for name, modules in whole.items():
            model.get_submodule(name)._modules = modules
    for name in lists:
        container = small.get_submodule(name)._modules
        shared = {id(small.config): small.config}
        container.update({key: copy.deepcopy(layer, dict(shared)) for key, layer in container.items()})  # none twice
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = [small.config.layer_types[index] for index in chosen]
    small.config.num_hidden_layers = len(chosen)
    return small
