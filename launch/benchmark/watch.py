"""One step under observation: the bytes of all tensors at the moment of most, what backward keeps, what collectives are handed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from relora_mora.config import DECODER_LINEARS

PARTS = ("weights", "optimizer", "gradients", "activations", "rest")


class _Storage(NamedTuple):
    part: str
    size: int
    alive: weakref.ref[Any]  # held, as it calls when the storage goes


class Watch(TorchDispatchMode):
    """Observes one step of a contender (``with Watch(...) as watch``); such a step is slow, and its time means nothing.

    ``peak``: bytes on the device at the moment of most, by part, every storage once. All contenders live in one process, so
    the process's resident memory says nothing of one of them; this sums the storages of the tensors that operations return,
    from what the contender held before the step. Scratch inside an operation is not seen on a CPU. On CUDA the sum is that
    of the allocator (``torch.cuda.max_memory_allocated``), and the rest has what the tensors do not explain.

    - weights, optimizer: what the contender says these are, between steps
    - gradients: what else stays between steps (sums of gradients, DeepSpeed's buffers, batches), and gradients of this step
    - activations: what autograd keeps for backward, parameters apart
    - rest: everything else that operations return

    ``kept``: the most that activations were. ``layer_kept`` and ``linears_kept``: of that, what one decoder layer in the
    middle of the model saves, and what its seven linears save; what attention or the activation function saves counts for
    the linears only where a linear saves it too (the input of o_proj is attention's result: kept by both at full rank).

    ``sent``: bytes that this rank hands to collectives, by kind; nothing with one rank. The payload of a collective is the
    whole tensor that it works on: the input of an all-reduce, reduce or reduce-scatter, the output of an all-gather. On a
    ring a rank then sends (W - 1) / W of the payload, and of an all-reduce twice that.
    """

    def __init__(
        self, model: nn.Module, held: Mapping[str, list[Tensor]], device: torch.device, world_size: int
    ) -> None:
        super().__init__()
        self.model, self.device, self.world_size = model, device, world_size
        self.sizes = dict.fromkeys(PARTS, 0)
        self.peak, self.kept, self.sent = dict(self.sizes), 0, dict[str, int]()
        self._storages: dict[int, _Storage] = {}
        self._layer: dict[int, int] = {}
        self._linears: dict[int, int] = {}
        self._inside_layer = self._inside_linear = False
        self._open = contextlib.ExitStack()
        for part, tensors in held.items():
            for tensor in tensors if part in PARTS else ():
                self._put(tensor, part)

    @property
    def layer_kept(self) -> int:
        return sum(self._layer.values())

    @property
    def linears_kept(self) -> int:
        return sum(self._linears.values())

    def __enter__(self) -> Watch:
        self._begin = self._allocated_bytes()
        for handle in self._hooks():
            self._open.callback(handle.remove)
        self._open.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._open.close()
        if self.device.type == "cuda":
            total = self._held + torch.cuda.max_memory_allocated() - self._begin
            self.peak["rest"] += total - sum(self.peak.values())

    def _allocated_bytes(self) -> int:
        self._held = sum(self.sizes.values())
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and self.world_size > 1:
            self._count(func.overloadpacket.__name__.strip("_"), args)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._put(value, "rest")
        return result

    def _count(self, kind: str, args: tuple[Any, ...]) -> None:
        if "barrier" in kind:
            return
        payloads = (sum(value.nbytes for value in tree_leaves(arg) if isinstance(value, Tensor)) for arg in args)
        self.sent[kind] = self.sent.get(kind, 0) + max(payloads, default=0)

    # ---- storages ---------------------------------------------------------------------------------------------

    def _put(self, tensor: Tensor, part: str) -> int:
        """Counts a tensor's storage as part of the given kind, when it is new; returns its key."""
        storage: Any = tensor.untyped_storage()
        key: int = storage._cdata
        if key not in self._storages and tensor.device.type == self.device.type:
            self._storages[key] = _Storage(part, storage.nbytes(), weakref.ref(storage, lambda _: self._gone(key)))
            self._add(part, storage.nbytes())
        return key

    def _move(self, tensor: Tensor, part: str, *, out_of: tuple[str, ...]) -> int:
        key = self._put(tensor, part)
        known = self._storages.get(key)
        if known is not None and known.part in out_of:
            self.sizes[known.part] -= known.size
            self._storages[key] = known._replace(part=part)
            self._add(part, known.size)
        return key

    def _add(self, part: str, size: int) -> None:
        self.sizes[part] += size
        self.kept = max(self.kept, self.sizes["activations"])
        if sum(self.sizes.values()) > sum(self.peak.values()):
            self.peak = dict(self.sizes)

    def _gone(self, key: int) -> None:
        known = self._storages.pop(key)
        self.sizes[known.part] -= known.size

    # ---- what autograd keeps ----------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return tensor
        key = self._move(tensor, "activations", out_of=("rest",))
        known = self._storages.get(key)
        if known is not None and known.part == "activations":
            if self._inside_layer:
                self._layer[key] = known.size
            if self._inside_linear:
                self._linears[key] = known.size
        return tensor if tensor.is_leaf else tensor.detach()  # what refers to its own node would never go

    def _hooks(self) -> Iterator[Any]:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                yield parameter.register_hook(self._is_gradient)
        layers = [module for module in self.model.modules() if isinstance(module, LlamaDecoderLayer)]
        layer = layers[len(layers) // 2]
        yield layer.register_forward_pre_hook(self._enter_layer)
        yield layer.register_forward_hook(self._leave_layer)
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in DECODER_LINEARS:
                yield module.register_forward_pre_hook(self._enter_linear)
                yield module.register_forward_hook(self._leave_linear)

    def _is_gradient(self, gradient: Tensor) -> None:
        self._move(gradient, "gradients", out_of=("rest", "activations"))

    def _enter_layer(self, *_: Any) -> None:
        self._layer.clear()  # of the micro-batch before
        self._linears.clear()
        self._inside_layer = True

    def _leave_layer(self, *_: Any) -> None:
        self._inside_layer = False

    def _enter_linear(self, *_: Any) -> None:
        self._inside_linear = True

    def _leave_linear(self, *_: Any) -> None:
        self._inside_linear = False
