"""What a program would have a CUDA device do, seen operation by operation on fake tensors."""

import collections
import contextlib
import traceback
from collections.abc import Iterator
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relora_mora.adapters.layers import adapter_layers
from tests.tools.helpers import ROOT

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_"}
READS_NOTHING = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill_", "zero_"}
WAITS = (torch.cuda, torch.cuda.Stream, torch.cuda.Event)
READS_BACK = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}  # besides copies from the device to the host

AFTER = 4  # the place of what expand_add waits for and does not read


class Watch(TorchDispatchMode):
    """Counts inside a fake mode: enter this mode after it.

    launches  operations on CUDA tensors by name, but views and allocations. An operation of several kernels (backward
              of attention, a sum over a large tensor) counts once, so this is a lower bound
    bytes     theirs: each input and output once, what is written in place once more, a broadcast dimension once
    syncs     waits of the host for the device, as "file:line operation" of the innermost lines of this project and of
              the code it called: for a value, all work, a stream, an event or a copy. Every value read back is 0: no
              overflow, no gradient
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.syncs: list[str] = []
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for owner in WAITS:
            wait = mock.patch.object(owner, "synchronize", lambda *_: self.syncs.append(f"{_place()} synchronize"))
            self._patches.enter_context(wait)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = list(cuda_tensors((args, kwargs)))
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            if given:
                self.syncs.append(f"{_place()} {name}")
            return False if args[0].dtype is torch.bool else 0.0 if args[0].is_floating_point() else 0
        result = func(*args, **kwargs)
        made = list(cuda_tensors(result))
        if (name in READS_BACK and given) or _is_blocking_copy(name, args, kwargs, result):
            self.syncs.append(f"{_place()} {name}")
        silent = func.is_view or name in NO_KERNEL or func.namespace == "prim" or _onto_itself(name, args)
        if (given or made) and not silent:
            self.launches[name] += 1
            touched = [*made, *_written(func, args, made), *_read(func, name, args, kwargs)]
            self.bytes[name] += sum(map(size_of, touched))
        return result


def _is_blocking_copy(name: str, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether a copy goes between host and device, and the host waits for it."""
    if name not in {"_to_copy", "copy_"}:
        return False
    source = args[1] if name == "copy_" else args[0]
    asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    return source.device.type != result.device.type and not asynchronous


def cuda_tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == "cuda")


def _read(func: Any, name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors whose values an operation needs: not those that it only writes."""
    if name in READS_NOTHING:
        return []
    if name == "copy_":
        args = args[1:]
    if name == "expand_add":
        args = args[:AFTER]
    outputs = {argument.name for argument in func._schema.arguments if argument.is_out}
    return list(cuda_tensors((args, [value for key, value in kwargs.items() if key not in outputs])))


def _written(func: Any, args: Any, made: list[Tensor]) -> list[Tensor]:
    """The arguments that an operation writes to and does not return."""
    arguments = zip(func._schema.arguments, args, strict=False)
    written = [value for argument, value in arguments if argument.is_write and not argument.is_out]
    return [value for value in cuda_tensors(written) if not any(value is tensor for tensor in made)]


def _onto_itself(name: str, args: Any) -> bool:
    """``x[i] += y`` ends with such a copy, which torch leaves out."""
    return name == "copy_" and args[0].untyped_storage()._cdata == args[1].untyped_storage()._cdata


def size_of(tensor: Tensor) -> int:
    """Bytes of memory of a tensor; a broadcast dimension counts once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride or length == 1 else 1
    return size


def _place() -> str:
    """The innermost line outside torch, and the one of this project that led to it."""
    lines = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    lines = [frame for frame in lines if frame.filename != __file__]
    ours = [frame for frame in lines if frame.filename.startswith(str(ROOT / "relora_mora"))]
    shown = [*ours[-1:], *(lines[-1:] if lines[-1:] != ours[-1:] else [])]
    return " -> ".join(f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}" for frame in shown)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for backward, each storage once, without parameters and resident weights."""

    def __init__(self, model: nn.Module) -> None:
        there = [*model.parameters(), *(layer.merged_weight for _, layer in adapter_layers(model))]
        self.there = {tensor.untyped_storage()._cdata for tensor in there if tensor is not None}
        self.storages: dict[int, Any] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for key, storage in self.storages.items() if key not in self.there)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor
