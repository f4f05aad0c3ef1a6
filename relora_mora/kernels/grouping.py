"""Groupings of features, as a list of pieces from which sum, copy and the compiled kernels all follow.

A grouping maps ``features`` to ``slots``: ``sum`` adds up the features of each slot, ``copy`` is its transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_mora.system.seeds import derived_seed


class Piece(NamedTuple):
    """``slots`` slots from ``slot`` on, with ``repeats`` features each, from ``feature`` on.

    The features of a slot lie side by side (``neighbours``), or ``slots`` apart from each other. A grouping that fits
    neither may have a piece for each feature; that is exact, and slow.
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
    def places(self) -> slice:
        return slice(self.slot, self.slot + self.slots)

    def by_slot(self, x: Tensor, dim: int = -1) -> tuple[Tensor, int]:
        """A view of the piece's features of x, with ``dim`` cut in two, and which of the two counts the repeats."""
        part = x.narrow(dim, self.feature, self.slots * self.repeats)
        sizes = (self.slots, self.repeats) if self.neighbours else (self.repeats, self.slots)
        return part.unflatten(dim, sizes), dim if self.neighbours else dim - 1


@dataclass(frozen=True)
class Grouping:
    """Together the pieces hold every feature, in order; those that follow hold features a second time.

    ``numbers`` is the grouping as whole numbers, for the schema of an operator of torch.
    """

    features: int
    slots: int
    pieces: tuple[Piece, ...]
    numbers: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        numbers = [self.features, self.slots, *(int(number) for piece in self.pieces for number in piece)]
        object.__setattr__(self, "numbers", numbers)

    @staticmethod
    def of_numbers(numbers: Sequence[int]) -> Grouping:
        """The grouping whose :attr:`numbers` these are."""
        return _of_numbers(tuple(numbers))

    def padded(self, multiple: int) -> Grouping:
        """With slots that no feature has, up to a multiple."""
        return replace(self, slots=-(-self.slots // multiple) * multiple)

    @property
    def once(self) -> bool:
        """Whether each feature has one slot."""
        return sum(piece.slots * piece.repeats for piece in self.pieces) == self.features

    def sum(self, x: Tensor) -> Tensor:
        """x [..., features] -> [..., slots], differentiable"""
        total = x.new_zeros(*x.shape[:-1], self.slots)
        for piece in self.pieces:
            part, repeats = piece.by_slot(x)
            total[..., piece.places] += part.sum(repeats)
        return total

    def share(self, y: Tensor) -> Tensor:
        """y [..., slots] -> [..., features]: to each its equal share of the slot's value, of two slots the mean"""
        sizes = self.sum(y.new_ones(self.features)).clamp(min=1)
        return self.copy(y / sizes) / self.copy(y.new_ones(self.slots))

    def copy(self, y: Tensor) -> Tensor:
        """y [..., slots] -> [..., features], differentiable"""
        wide: list[Tensor] = []
        again: list[Tensor] = []
        end = 0
        for piece in self.pieces:
            part = y[..., piece.places].unsqueeze(-1 if piece.neighbours else -2)
            sizes = (piece.slots, piece.repeats) if piece.neighbours else (piece.repeats, piece.slots)
            part = part.expand(*y.shape[:-1], *sizes).flatten(-2)
            if piece.feature == end:
                wide.append(part)
                end = piece.columns.stop
            else:
                again.append(F.pad(part, (piece.feature, self.features - piece.columns.stop)))
        return sum(again, start=torch.cat(wide, -1))


def as_rows(x: Tensor) -> Tensor:
    """x [..., n] as [rows, n] with neighbours in memory, a view where possible"""
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
    """As :func:`interleaved`, but the last group is filled up with the first features, which so count twice."""
    pieces = list(interleaved(features, slots).pieces)
    filled = features % slots
    while 0 < filled < slots:
        more = min(slots - filled, features)
        pieces.append(Piece(0, filled, more, 1, False))
        filled += more
    return Grouping(features, slots, tuple(pieces))


def contiguous(features: int, slots: int) -> Grouping:
    """Neighbours share a slot: the first ``features mod slots`` slots take one feature more than the others."""
    per_slot, longer = divmod(features, slots)
    head = longer * (per_slot + 1)
    pieces = [Piece(0, 0, longer, per_slot + 1, True), Piece(head, longer, slots - longer, per_slot, True)]
    return Grouping(features, slots, _without_empty(pieces))


def rotated(features: int, slots: int, seed: int = 0) -> Grouping:
    """As :func:`interleaved`, but the k-th run of ``slots`` features is rotated by a shift that ``seed`` decides.

    Feature ``k * slots + j`` belongs to slot ``(j + s_k) mod slots``. The first shift is 0, since to rotate all runs
    alike only renames the slots. The others are independent and uniform, so features of two runs share a slot with
    probability ``1 / slots``. A run is one or two pieces.
    """
    pieces = []
    for begin in range(0, features, slots):
        length = min(slots, features - begin)
        shift = derived_seed(seed, begin // slots) % slots if begin else 0
        first = min(length, slots - shift)  # the others come out at the front
        pieces += [Piece(begin, shift, first, 1, False), Piece(begin + first, 0, length - first, 1, False)]
    return Grouping(features, slots, _without_empty(pieces))


def _without_empty(pieces: list[Piece]) -> tuple[Piece, ...]:
    return tuple(piece for piece in pieces if piece.slots and piece.repeats)
