"""What the tests of memory share."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from relora_mora.config.load import validate
from relora_mora.config.schema import Config


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live storages that operations allocate, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, Any] = {}
        self.now = self.most = 0

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
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out


def make_config(method: dict[str, Any], model: dict[str, Any] | None = None, micro_batch_size: int = 4) -> Config:
    tree = {
        "model": {"config": "x", **(model or {})},
        "tokenizer": {"path": "x"},
        "data": {"train": "x", "validation": "x", "sequence_length": 64},
        "method": {"rank": 16, **method},
        "train": {"run_dir": "x", "batch_size": micro_batch_size, "micro_batch_size": micro_batch_size},
    }
    return validate(tree, "the test")
