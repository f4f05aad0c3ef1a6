"""Gives optimizers whole matrices, which ZeRO has cut into flat tensors on several ranks.

A matrix that is whole on one rank is updated there. The pieces of a cut matrix go to its owner, one of the ranks that
hold it, and come back changed. This takes two all-to-all exchanges per call of the optimizer, and only pieces of cut
matrices are sent. At stages 1 and 2 those are the matrices at the borders between ranks; at stage 3 all are cut, and at
stage 0 none.
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


class Placed(NamedTuple):
    """Where the pieces of a matrix are; the rank ``owner`` changes it."""

    name: str
    shape: torch.Size
    pieces: Sequence[Piece]
    owner: int

    @property
    def is_cut(self) -> bool:
        return len({piece.rank for piece in self.pieces}) > 1


class CutMatrices:
    """The matrices of an engine with these ``names``, for its optimizer.

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
        pieces: dict[str, list[Piece]] = {}
        for holder, parts in fragments.items():
            for part in parts:
                pieces.setdefault(part.name, []).append(Piece(holder, part))
        held = {name: pieces[name] for name in names}
        owners = _owners(held, shapes)
        self.owned = [name for name, owner in owners.items() if owner == rank]
        self._of_flat: dict[int, list[Placed]] = {}
        for name, of_matrix in held.items():
            placed = Placed(name, shapes[name], of_matrix, owners[name])
            self._of_flat.setdefault(id(of_matrix[0].fragment.flat), []).append(placed)
        self._exchanges: dict[tuple[int, ...], Exchange] = {}

    @torch.no_grad()
    def replace(self, gradients: Mapping[Tensor, Tensor], update: Update) -> None:
        """Replaces all matrices in the gradients, which are keyed by flat tensor.

        ``update`` gets k matrices of one shape as a stack [k, m, n], with their names, and returns their new values.
        This is a collective if a matrix is cut: all ranks call it for the same flat tensors.
        """
        flats = tuple(id(flat) for flat in gradients)
        if flats not in self._exchanges:
            placed = [each for flat in flats for each in self._of_flat.get(flat, ())]
            self._exchanges[flats] = Exchange(placed, self.rank, self.world_size)
        self._exchanges[flats].replace({id(flat): each for flat, each in gradients.items()}, update)


class Exchange:
    """Sends the matrices of some flat tensors to their owners and back."""

    def __init__(self, matrices: Sequence[Placed], rank: int, world_size: int) -> None:
        self.whole = [matrix for matrix in matrices if matrix.owner == rank and not matrix.is_cut]
        self.cut = [matrix for matrix in matrices if matrix.is_cut]
        self.owned = [matrix for matrix in self.cut if matrix.owner == rank]
        # pieces by destination rank and by source rank (maybe this one)
        self.outgoing: list[list[Fragment]] = [[] for _ in range(world_size)]
        self.incoming: list[list[Fragment]] = [[] for _ in range(world_size)]
        for matrix in self.cut:
            for piece in matrix.pieces:
                if piece.rank == rank:
                    self.outgoing[matrix.owner].append(piece.fragment)
                if matrix.owner == rank:
                    self.incoming[piece.rank].append(piece.fragment)
        self.sent_to = [sum(part.numel for part in parts) for parts in self.outgoing]  # elements
        self.received_from = [sum(part.numel for part in parts) for parts in self.incoming]

    def replace(self, gradients: Mapping[int, Tensor], update: Update) -> None:
        """See :meth:`CutMatrices.replace`; gradients by the id of flat tensors."""
        whole = [(matrix, part.of(gradients[id(part.flat)])) for matrix in self.whole for _, part in matrix.pieces]
        if not self.cut:
            _change(whole, update)
            return
        assembled = self._assemble(gradients)
        _change([*whole, *((matrix, assembled[matrix.name]) for matrix in self.owned)], update)
        self._give_back(assembled, gradients)

    def _assemble(self, gradients: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The whole matrices that this rank owns, flattened, from all ranks' pieces."""
        example = next(iter(gradients.values()))
        leaving = [part.of(gradients[id(part.flat)]) for parts in self.outgoing for part in parts]
        arriving = [part for parts in self.incoming for part in parts]
        received = example.new_empty(sum(self.received_from))
        sent = torch.cat([*leaving, example.new_empty(0)])
        dist.all_to_all_single(received, sent, self.received_from, self.sent_to)
        matrices = {matrix.name: example.new_empty(matrix.shape.numel()) for matrix in self.owned}
        for part, place in zip(arriving, received.split([part.numel for part in arriving]), strict=True):
            part.of_whole(matrices[part.name]).copy_(place)
        return matrices

    def _give_back(self, matrices: Mapping[str, Tensor], gradients: Mapping[int, Tensor]) -> None:
        """Sends the pieces of the changed matrices back to where they came from."""
        example = next(iter(gradients.values()))
        returning = [part.of_whole(matrices[part.name]) for parts in self.incoming for part in parts]
        places = [part.of(gradients[id(part.flat)]) for parts in self.outgoing for part in parts]
        received = example.new_empty(sum(self.sent_to))
        sent = torch.cat([*returning, example.new_empty(0)])
        dist.all_to_all_single(received, sent, self.sent_to, self.received_from)
        for place, values in zip(places, received.split([place.numel() for place in places]), strict=True):
            place.copy_(values)


def _change(matrices: Iterable[tuple[Placed, Tensor]], update: Update) -> None:
    """Updates matrices, which come flattened, in stacks of one shape."""
    alike: dict[torch.Size, list[tuple[str, Tensor]]] = {}
    for placed, flat in matrices:
        alike.setdefault(placed.shape, []).append((placed.name, flat.view(placed.shape)))
    for shape, members in alike.items():
        count = matrices_at_once(shape, on_gpu=members[0][1].is_cuda)
        for start in range(0, len(members), count):
            names, values = zip(*members[start : start + count], strict=True)
            stack = torch.stack(values) if len(values) > 1 else values[0].unsqueeze(0)
            for matrix, changed in zip(values, update(stack, names), strict=True):
                matrix.copy_(changed)


def _owners(held: Mapping[str, Sequence[Piece]], shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """The rank that changes each matrix: the least busy of the ranks that hold much of it, largest matrices first."""
    costs = {name: shapes[name].numel() * min(shapes[name]) for name in held}
    work: dict[int, int] = {}
    owners: dict[str, int] = {}
    for name in sorted(held, key=lambda name: -costs[name]):
        holds: dict[int, int] = {}
        for rank, fragment in held[name]:
            holds[rank] = holds.get(rank, 0) + fragment.numel
        candidates = [rank for rank, numel in holds.items() if 2 * numel >= max(holds.values())]
        owner = min(candidates, key=lambda rank: (work.get(rank, 0), rank))
        work[owner] = work.get(owner, 0) + costs[name]
        owners[name] = owner
    return owners
