"""Gives optimizers whole matrices, which ZeRO has cut into flat tensors on several ranks.

A matrix that is whole on one rank is updated there. The pieces of a cut matrix go to its owner, one of the ranks that
hold it, and come back changed. This takes two all-to-all exchanges per call of the optimizer, and only pieces of cut
matrices are sent. At stages 1 and 2 those are the matrices at the borders between ranks; at stage 3 all matrices are
cut, and at stage 0 none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from deepspeed import comm as dist
from torch import Tensor

from relora_mora.engine.masters import Fragment
from relora_mora.optim.groups import matrices_at_once

Update = Callable[[Tensor, Sequence[str]], Tensor]


class Piece(NamedTuple):
    """The part of a matrix that a rank holds."""

    rank: int
    fragment: Fragment


class Matrix(NamedTuple):
    """Where the pieces of a matrix are; the rank ``owner`` changes it."""

    name: str
    shape: torch.Size
    pieces: Sequence[Piece]
    owner: int


class CutMatrices:
    """The matrices ``names`` of an engine, for its optimizer.

    ``fragments`` has what each rank owns, with flat tensors of this ``rank``, in the engine's order, which is the same
    on all ranks. ``owned`` has the names of the matrices that this rank changes; at stage 0 every rank changes all.
    """

    def __init__(
        self,
        names: Iterable[str],
        fragments: Mapping[int, Iterable[Fragment]],
        shapes: Mapping[str, torch.Size],
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        pieces: dict[str, list[Piece]] = {name: [] for name in names}
        for holder, parts in fragments.items():
            for part in parts:
                if part.name in pieces:
                    pieces[part.name].append(Piece(holder, part))
        self._of_flat: dict[int, list[Matrix]] = {}
        owners = _owners(pieces, shapes)
        self.owned = [name for name, owner in owners.items() if owner == rank]
        for name, held in pieces.items():
            matrix = Matrix(name, shapes[name], held, owners[name])
            self._of_flat.setdefault(id(held[0].fragment.flat), []).append(matrix)
        self._exchanges: dict[tuple[int, ...], Exchange] = {}

    @torch.no_grad()
    def replace(self, gradients: Mapping[Tensor, Tensor], update: Update) -> None:
        """Replaces all matrices in the gradients, which are keyed by flat tensor.

        ``update`` gets stacked matrices [k, m, n] and their names, and returns the new values. This is a collective if
        a matrix is cut: all ranks call it for the same flat tensors.
        """
        flats = tuple(id(flat) for flat in gradients)
        if flats not in self._exchanges:
            matrices = [matrix for flat in flats for matrix in self._of_flat.get(flat, ())]
            self._exchanges[flats] = Exchange(matrices, self.rank, self.world_size)
        self._exchanges[flats].replace({id(flat): gradient for flat, gradient in gradients.items()}, update)


class Exchange:
    """Sends the matrices of some flat tensors to their owners and back."""

    def __init__(self, matrices: Sequence[Matrix], rank: int, world_size: int) -> None:
        self.whole = [
            (matrix, matrix.pieces[0].fragment)
            for matrix in matrices
            if matrix.owner == rank and len(matrix.pieces) == 1
        ]
        self.cut = [matrix for matrix in matrices if len(matrix.pieces) > 1]
        self.is_needed = bool(self.cut)
        # pieces by destination rank and, with the index of their matrix in ``cut``, by source rank (maybe this one)
        self.outgoing: list[list[Fragment]] = [[] for _ in range(world_size)]
        self.incoming: list[list[tuple[int, Fragment]]] = [[] for _ in range(world_size)]
        for number, matrix in enumerate(self.cut):
            for piece in matrix.pieces:
                if piece.rank == rank:
                    self.outgoing[matrix.owner].append(piece.fragment)
                if matrix.owner == rank:
                    self.incoming[piece.rank].append((number, piece.fragment))
        self.sent_to = [sum(part.numel for part in parts) for parts in self.outgoing]  # elements
        self.received_from = [sum(part.numel for _, part in parts) for parts in self.incoming]

    def replace(self, gradients: Mapping[int, Tensor], update: Update) -> None:
        """See :meth:`CutMatrices.replace`; here the gradients are keyed by the id of their flat tensor."""
        whole = [(matrix, part.of(gradients[id(part.flat)])) for matrix, part in self.whole]
        if not self.is_needed:
            _change(whole, update)
            return
        leaving = [part.of(gradients[id(part.flat)]) for parts in self.outgoing for part in parts]
        arriving = [piece for pieces in self.incoming for piece in pieces]
        example = next(iter(gradients.values()))
        sent = torch.cat([*leaving, example.new_empty(0)])
        received = example.new_empty(sum(self.received_from))
        dist.all_to_all_single(received, sent, self.received_from, self.sent_to)
        places = received.split([part.numel for _, part in arriving])
        cut = {number: example.new_empty(self.cut[number].shape.numel()) for number, _ in arriving}
        for (number, part), place in zip(arriving, places, strict=True):
            part.of_whole(cut[number]).copy_(place)
        _change([*whole, *((self.cut[number], values) for number, values in cut.items())], update)
        for (number, part), place in zip(arriving, places, strict=True):
            place.copy_(part.of_whole(cut[number]))
        dist.all_to_all_single(sent, received, self.sent_to, self.received_from)
        for values, place in zip(leaving, sent.split([values.numel() for values in leaving]), strict=True):
            values.copy_(place)


def _change(matrices: Iterable[tuple[Matrix, Tensor]], update: Update) -> None:
    """Updates matrices, whose values come flattened, in stacks of one shape."""
    of_shape: dict[torch.Size, list[tuple[str, Tensor]]] = {}
    for matrix, values in matrices:
        of_shape.setdefault(matrix.shape, []).append((matrix.name, values.view(matrix.shape)))
    for shape, members in of_shape.items():
        count = matrices_at_once(shape, on_gpu=members[0][1].is_cuda)
        for start in range(0, len(members), count):
            names, together = zip(*members[start : start + count], strict=True)
            stacked = torch.stack(together) if len(together) > 1 else together[0].unsqueeze(0)
            for values, changed in zip(together, update(stacked, names), strict=True):
                values.copy_(changed)


def _owners(pieces: Mapping[str, Sequence[Piece]], shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """The rank that changes each matrix: the least busy of the ranks that hold much of it, largest matrices first."""
    costs = {name: shapes[name].numel() * min(shapes[name]) for name in pieces}
    work: dict[int, int] = {}
    owners: dict[str, int] = {}
    for name in sorted(pieces, key=lambda name: -costs[name]):
        largest = max(piece.fragment.numel for piece in pieces[name])
        candidates = [piece.rank for piece in pieces[name] if 2 * piece.fragment.numel >= largest]
        owner = min(candidates, key=lambda rank: (work.get(rank, 0), rank))
        work[owner] = work.get(owner, 0) + costs[name]
        owners[name] = owner
    return owners
