"""What a merge needs of the engine that trains the model.

A merge works on whole float32 values by name. An engine knows where they are: in a process of plain torch, on the ranks
of DDP, in the shards of FSDP2, or in the flat partitions of DeepSpeed's ZeRO stages.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """The trainable parameters, their optimizer state and the frozen weights of ``lm``, by their names in it.

    Most methods are collectives: every rank calls all of them in the same order.
    """

    @property
    def lm(self) -> nn.Module: ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def copies(self) -> int:
        """How many ranks hold each element of a trainable parameter."""

    @property
    def device(self) -> torch.device: ...

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of the whole parameters."""

    def moments_of(self, name: str) -> Sequence[str]:
        """The names of a trainable parameter's optimizer state that has one value per element."""

    def held(self, names: Sequence[str]) -> tuple[int, list[str]]:
        """How many elements of these parameters all ranks hold together, and which have values that are not finite."""

    def gather(self, name: str, key: str | None = None, to: int | None = None) -> Tensor:
        """The whole float32 value of a trainable parameter, or of its moment ``key``.

        With ``to``, only that rank gets the value; what the others get is undefined.
        """

    def scatter(self, name: str, value: Tensor, key: str | None = None) -> int:
        """Sets a trainable parameter, or its moment, from the whole value; returns how many elements this rank wrote.

        The model computes with the new value after :meth:`refresh`.
        """

    def read_weight(self, name: str) -> Tensor:
        """A whole parameter as the model has it, on every rank; a collective if it is sharded."""

    def is_whole(self, name: str) -> bool:
        """Whether every rank has the whole parameter."""

    def write_weight(self, name: str, value: Tensor | None, owner: int) -> None:
        """Sets a frozen weight on all ranks from its owner's float32 value."""

    def clear_state(self, names: Set[str]) -> None:
        """Resets the optimizer state of these parameters, as in a new optimizer."""

    def refresh(self) -> None:
        """Makes the model compute with the values of :meth:`scatter`."""

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in host memory; ``values`` is overwritten."""
