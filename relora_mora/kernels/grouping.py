"""Groupings of features, defined by lists of pieces that sum, copy and the compiled kernels all use.

A grouping maps ``features`` to ``slots``. ``sum`` adds up the features of each slot, and ``copy`` is its transpose.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Piece(NamedTuple):
    """``slots`` slots from ``slot`` on, each with ``repeats`` features; the features start at ``feature``.

    The features of a slot are adjacent (``neighbours``) or ``slots`` apart. A grouping with any other pattern can have
    one piece per feature, which is exact but slow.
    """

    feature: int
    slot: int
    slots: int
    repeats: int
    neighbours: bool

    @property
    def columns(self) -> slice:
        return slice(self.feature, self.feature + self.slots * self.repeats)

    @property
    def slot_range(self) -> slice:
        return slice(self.slot, self.slot + self.slots)

    def by_slot(self, x: Tensor, dim: int = -1) -> tuple[Tensor, int]:
        """A view of the piece's features with ``dim`` split in two, and the dimension that counts the repeats."""
        part = x.narrow(dim, self.feature, self.slots * self.repeats)
        sizes = (self.slots, self.repeats) if self.neighbours else (self.repeats, self.slots)
        return part.unflatten(dim, sizes), dim if self.neighbours else dim - 1


@dataclass(frozen=True)
class Grouping:
    """The first pieces contain every feature once, in order. Any further pieces contain features a second time.

    ``numbers`` encodes the grouping as integers, for the schema of an operator of torch.
    """

    features: int
    slots: int
    pieces: tuple[Piece, ...]
    numbers: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        numbers = [self.features, self.slots, *(int(number) for piece in self.pieces for number in piece)]
        object.__setattr__(self, "numbers", numbers)

    @staticmethod
    def of_numbers(numbers: Sequence[int]) -> "Grouping":
        """Decodes :attr:`numbers`."""
        return _of_numbers(tuple(numbers))

    def padded(self, multiple: int) -> "Grouping":
        """The grouping with empty slots added, up to a multiple."""
        return replace(self, slots=-(-self.slots // multiple) * multiple)

    @property
    def once(self) -> bool:
        """Whether each feature has only one slot."""
        return sum(piece.slots * piece.repeats for piece in self.pieces) == self.features

    def sum(self, x: Tensor) -> Tensor:
        """x [..., features] -> [..., slots], differentiable"""
        total = x.new_zeros(*x.shape[:-1], self.slots)
        for piece in self.pieces:
            part, repeats = piece.by_slot(x)
            total[..., piece.slot_range] += part.sum(repeats)
        return total

    def share(self, y: Tensor) -> Tensor:
        """y [..., slots] -> [..., features]: an equal share of the slot's value, or the mean share of two slots"""
        sizes = self.sum(y.new_ones(self.features)).clamp(min=1)
        return self.copy(y / sizes) / self.copy(y.new_ones(self.slots))

    def copy(self, y: Tensor) -> Tensor:
        """y [..., slots] -> [..., features], differentiable"""
        first: list[Tensor] = []
        repeated: list[Tensor] = []
        end = 0
        for piece in self.pieces:
            part = y[..., piece.slot_range].unsqueeze(-1 if piece.neighbours else -2)
            sizes = (piece.slots, piece.repeats) if piece.neighbours else (piece.repeats, piece.slots)
            part = part.expand(*y.shape[:-1], *sizes).flatten(-2)
            if piece.feature == end:
                first.append(part)
                end = piece.columns.stop
            else:
                repeated.append(F.pad(part, (piece.feature, self.features - piece.columns.stop)))
        return sum(repeated, start=torch.cat(first, -1))


def as_rows(x: Tensor) -> Tensor:
    """x [..., n] -> [rows, n] with the elements of a row adjacent in memory; a view if possible"""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@lru_cache(maxsize=4096)
def _of_numbers(numbers: tuple[int, ...]) -> Grouping:
    features, slots, *rest = numbers
    pieces = []
    for start in range(0, len(rest), len(Piece._fields)):
        feature, slot, count, repeats, neighbours = rest[start : start + len(Piece._fields)]
        pieces.append(Piece(feature, slot, count, repeats, bool(neighbours)))
    return Grouping(features, slots, tuple(pieces))


def interleaved(features: int, slots: int) -> Grouping:
    """Feature i belongs to slot i mod slots; the last group may be incomplete."""
    whole, rest = divmod(features, slots)
    pieces = [Piece(0, 0, slots, whole, False), Piece(whole * slots, 0, rest, 1, False)]
    return Grouping(features, slots, _without_empty(pieces))


def wrapped_interleaved(features: int, slots: int) -> Grouping:
    """As :func:`interleaved`, but the last group is filled up with the first features, which then count twice."""
    pieces = list(interleaved(features, slots).pieces)
    filled = features % slots
    while 0 < filled < slots:
        more = min(slots - filled, features)
        pieces.append(Piece(0, filled, more, 1, False))
        filled += more
    return Grouping(features, slots, tuple(pieces))


def contiguous(features: int, slots: int) -> Grouping:
    """Adjacent features share a slot; the first ``features mod slots`` slots have one more feature than the others."""
    per_slot, longer = divmod(features, slots)
    head = longer * (per_slot + 1)
    pieces = [Piece(0, 0, longer, per_slot + 1, True), Piece(head, longer, slots - longer, per_slot, True)]
    return Grouping(features, slots, _without_empty(pieces))


def _without_empty(pieces: list[Piece]) -> tuple[Piece, ...]:
    return tuple(piece for piece in pieces if piece.slots and piece.repeats)
