"""Counts the bytes of one step: tensors at the peak, tensors kept for backward, and payloads of collectives."""

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

from relora_mora.config.schema import DECODER_LINEARS

PARTS = ("weights", "optimizer", "gradients", "activations", "rest")


class _Storage(NamedTuple):
    part: str
    size: int
    alive: weakref.ref[Any]  # kept, because its callback reports when the storage is freed


class ByteTracker(TorchDispatchMode):
    """Counts the bytes of one step that a contender makes inside ``with tracker:``. The step is slow; do not time it.

    ``peak``: bytes on the device at the peak of the step, by part, with each storage counted once. All contenders live
    in one process, so its resident memory says nothing about a single one. The tracker therefore starts from the
    tensors that the contender held before the step and adds the storages of the tensors that operations return. Scratch
    memory inside an operation is not visible on a CPU. On CUDA the total comes from the allocator
    (``torch.cuda.max_memory_allocated``), and ``rest`` includes bytes that no tensor explains.

    - weights, optimizer: the tensors that the contender lists for them between steps
    - gradients: everything else that stays between steps (sums of gradients, DeepSpeed's buffers, batches), and the
      gradients of this step
    - activations: tensors that autograd keeps for backward, except parameters
    - rest: all other results of operations

    ``kept``: the maximum of activations. ``layer_kept`` and ``linears_kept``: the part that one decoder layer in the
    middle of the model saves, and the part that its seven linears save. A tensor that attention or the activation
    function saves counts for the linears only if a linear saves it, too (at full rank o_proj saves its input, the
    result of attention).

    ``sent``: bytes that this rank passes to collectives, by kind; empty with one rank. The payload of a collective is
    the whole tensor it works on: the input of an all-reduce, reduce or reduce-scatter, or the output of an all-gather.
    In a ring of W ranks each rank then sends (W - 1) / W of the payload, and twice as much for an all-reduce.
    """

    def __init__(
        self, model: nn.Module, held: Mapping[str, list[Tensor]], device: torch.device, world_size: int
    ) -> None:
        super().__init__()
        self.model = model
        self.device = device
        self.world_size = world_size
        self.sizes = dict.fromkeys(PARTS, 0)
        self.peak = dict(self.sizes)
        self.kept = 0
        self.sent: dict[str, int] = {}
        self._storages: dict[int, _Storage] = {}
        self._layer: dict[int, int] = {}
        self._linears: dict[int, int] = {}
        self._inside_layer = False
        self._inside_linear = False
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

    def __enter__(self) -> ByteTracker:
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

    def _put(self, tensor: Tensor, part: str) -> int:
        """Counts a tensor's storage as ``part`` if it is new; returns its key."""
        storage: Any = tensor.untyped_storage()
        key: int = storage._cdata
        if key not in self._storages and tensor.device.type == self.device.type:
            self._storages[key] = _Storage(part, storage.nbytes(), weakref.ref(storage, lambda _: self._freed(key)))
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

    def _freed(self, key: int) -> None:
        known = self._storages.pop(key)
        self.sizes[known.part] -= known.size

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
        return tensor if tensor.is_leaf else tensor.detach()  # a tensor that refers to its own node is never freed

    def _hooks(self) -> Iterator[Any]:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                yield parameter.register_hook(self._is_gradient)
        layers = [module for module in self.model.modules() if type(module).__name__.endswith("DecoderLayer")]
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
        self._layer.clear()  # bytes of the previous micro-batch
        self._linears.clear()
        self._inside_layer = True

    def _leave_layer(self, *_: Any) -> None:
        self._inside_layer = False

    def _enter_linear(self, *_: Any) -> None:
        self._inside_linear = True

    def _leave_linear(self, *_: Any) -> None:
        self._inside_linear = False
