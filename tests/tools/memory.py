"""How much memory tensors take, as a test counts it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Measures the peak of the bytes that results of operations occupy; ``inputs`` are addresses not to count."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.peak = 0
        self.known: set[int] = set()
        self.inputs: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known | self.inputs:
                self.known.add(storage.data_ptr())
                self.allocated += storage.nbytes()
                weakref.finalize(storage, self._free, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self.allocated)
        return result

    def _free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.allocated -= size
