"""The exact values of frozen weights in a training loop of one's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from relora_mora.engine.merging import FrozenMasters
from relora_mora.engine.protocol import Engine
from relora_mora.engine.torch_state import rank_and_size


class LoopMasters(FrozenMasters):
    """Masters of the weights that are not whole and float32 on every rank. A weight that is so is its own master.

    They are made at the first merge. Until then the weights themselves are exact. ``kept`` has the names of all
    masters, on every rank.
    """

    def __init__(self, names: Sequence[str], group: Any) -> None:
        super().__init__(names, *rank_and_size(group))
        self.group = group
        self.kept: list[str] = []
        self.engine: Engine

    def __getstate__(self) -> dict[str, Any]:
        """Without the process group, and without the engine, which has the optimizer."""
        return {key: value for key, value in vars(self).items() if key != "engine"} | {"group": None}

    def prepare(self, engine: Engine) -> None:
        """Called before a merge; a collective. Makes the masters that are missing, and compares the others.

        Raises ValueError if a weight is not its rounded master.
        """
        self.engine = engine
        needed = [name for name in self.owner if self._needs_master(name)]
        changed = torch.zeros(len(needed), dtype=torch.float64, device=engine.device)
        for index, name in enumerate(needed):
            weight = engine.read_weight(name)
            if self.owner[name] != self.rank:
                continue
            if name in self.kept:
                changed[index] = not torch.equal(self.weights[name].to(weight.device, weight.dtype), weight)
            else:
                self.put(name, weight)
        wrong = [name for name, count in zip(needed, engine.all_reduce(changed).tolist(), strict=True) if count]
        if wrong:
            raise ValueError(
                f"{len(wrong)} frozen weights ({wrong[0]}, ...) are not what the last merge made of them, since they "
                "were loaded or changed; call load_state_dict() with the state that was saved together with them"
            )
        self.kept = needed

    def _needs_master(self, name: str) -> bool:
        return self.engine.lm.get_parameter(name).dtype != torch.float32 or not self.engine.is_whole(name)

    def add(self, name: str, delta: Tensor) -> Tensor:
        return super().add(name, delta) if name in self.kept else self.engine.read_weight(name).float() + delta

    def exact(self, name: str, engine: Engine) -> Tensor:
        """The float32 value of a weight, on every rank; a collective."""
        if name not in self.kept:
            return engine.read_weight(name).float()
        value = torch.empty(engine.shapes[name], dtype=torch.float32, device=engine.device)
        if name in self.weights:
            value.copy_(self.weights[name])
        if self.world_size > 1:
            distributed.broadcast(value, group=self.group, group_src=self.owner[name])
        return value

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Takes the masters of this rank from those of all ranks."""
        self.kept = list(values)
        self.weights = {}
        for name in self.owned:
            if name in values:
                self.put(name, values[name])
