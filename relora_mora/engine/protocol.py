"""What a merge needs of the engine that trains the model.

A merge works on whole float32 values by name. An engine knows where they are: in a process of plain torch, on the ranks
of DDP, in the shards of FSDP2, or in the flat partitions of DeepSpeed's ZeRO stages.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, distributed, nn


class Engine(ABC):
    """The trainable parameters, their optimizer state and the frozen weights of ``lm``, by their names in it.

    Most methods are collectives: every rank of ``group`` calls all of them in the same order.
    """

    lm: nn.Module
    group: Any = None
    rank: int
    world_size: int
    copies: int  # how many ranks hold each element of a trainable parameter
    device: torch.device
    shapes: Mapping[str, torch.Size]  # of the whole parameters

    @abstractmethod
    def parts(self, name: str, key: str | None = None) -> list[Tensor]:
        """The elements of a trainable parameter, or of its moment ``key``, that this rank holds."""

    @abstractmethod
    def moments_of(self, name: str) -> Sequence[str]:
        """The names of a trainable parameter's optimizer state that has one value per element."""

    @abstractmethod
    def gather(self, name: str, key: str | None = None, to: int | None = None) -> Tensor:
        """The whole float32 value of a trainable parameter, or of its moment ``key``.

        With ``to``, only that rank gets the value; what the others get is undefined.
        """

    @abstractmethod
    def scatter(self, name: str, value: Tensor, key: str | None = None) -> int:
        """Sets a trainable parameter, or its moment, from the whole value; returns how many elements this rank wrote.

        The model computes with the new value after :meth:`refresh`.
        """

    @abstractmethod
    def read_weight(self, name: str) -> Tensor:
        """A whole parameter as the model has it, on every rank; a collective if it is sharded."""

    @abstractmethod
    def is_whole(self, name: str) -> bool:
        """Whether every rank has the whole parameter."""

    @abstractmethod
    def write_weight(self, name: str, value: Tensor | None, owner: int) -> None:
        """Sets a frozen weight on all ranks from its owner's float32 value."""

    @abstractmethod
    def clear_state(self, names: Set[str]) -> None:
        """Resets the optimizer state of these parameters, as in a new optimizer."""

    @abstractmethod
    def refresh(self) -> None:
        """Makes the model compute with the values of :meth:`scatter`."""

    def elements_held(self, names: Sequence[str]) -> int:
        """How many elements of these parameters all ranks hold together, each counted once."""
        held = sum(part.numel() for name in names for part in self.parts(name))
        return int(self.all_reduce(torch.tensor(held, dtype=torch.float64, device=self.device))) // self.copies

    @torch.no_grad()
    def not_finite(self, names: Sequence[str]) -> list[str]:
        """Those of these parameters that have a value on some rank that is not finite."""
        counts = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        for index, name in enumerate(names):
            for part in self.parts(name):
                counts[index] += ~part.isfinite().all()
        return [name for name, count in zip(names, self.all_reduce(counts).tolist(), strict=True) if count]

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in host memory; ``values`` is overwritten."""
        if self.world_size > 1:
            distributed.all_reduce(values, group=self.group)
        return values.cpu()

    def broadcast(self, value: Tensor, src: int) -> None:
        """Copies the value of rank ``src`` to every rank, in place; a collective."""
        if self.world_size > 1:
            distributed.broadcast(value, group=self.group, group_src=src)
