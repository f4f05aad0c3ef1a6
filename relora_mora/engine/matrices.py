"""Gives optimizers whole matrices, which ZeRO has cut into flat tensors on several ranks.

A matrix that is whole on one rank is updated there. The pieces of a cut matrix go to its owner, one of the ranks that
hold it, and come back changed. This takes two all-to-all exchanges per call of the optimizer, and only pieces of cut
matrices are sent. At stages 1 and 2 those are the matrices at the borders between ranks; at stage 3 all are cut, and at
stage 0 none.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from deepspeed import comm as dist
from torch import Tensor

from relora_mora.engine.masters import Fragment
from relora_mora.optim.groups import matrices_at_once

Update = Callable[[Tensor, Sequence[str]], Tensor]


class CutMatrices:
    """The matrices of an engine with these ``names``, for its optimizer.

    ``fragments`` has what each rank owns, in an order that is the same on all ranks; at stage 0 only what this ``rank``
    owns. ``owned`` has the names of the matrices that this rank changes; at stage 0 every rank changes all.
    """

    def __init__(
        self,
        names: Iterable[str],
        fragments: Iterable[Fragment],
        shapes: Mapping[str, torch.Size],
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.shapes = shapes
        self.pieces: dict[str, list[Fragment]] = {name: [] for name in names}
        for part in fragments:
            if part.name in self.pieces:
                self.pieces[part.name].append(part)
        self.owner = _owners(self.pieces, shapes)
        self.owned = [name for name, owner in self.owner.items() if owner == rank]

    @torch.no_grad()
    def replace(self, gradients: Mapping[Tensor, Tensor], update: Update) -> None:
        """Replaces all matrices in the gradients, which are keyed by flat tensor.

        ``update`` gets k matrices of one shape as a stack [k, m, n], with their names, and returns their new values.
        This is a collective if a matrix is cut: all ranks call it for the same flat tensors.
        """
        of_flat = {id(flat): gradient for flat, gradient in gradients.items()}
        example = next(iter(gradients.values()))
        matrices: dict[str, Tensor] = {}  # flattened, those that this rank changes
        cut: list[str] = []
        for name, pieces in self.pieces.items():
            first = pieces[0]
            if id(first.flat) not in of_flat:
                continue
            if any(part.rank != first.rank for part in pieces):
                cut.append(name)
            elif self.owner[name] == self.rank:
                matrices[name] = first.of(of_flat[id(first.flat)])
        if not cut:
            self._change(matrices, update)
            return
        outgoing: list[list[Tensor]] = [[] for _ in range(self.world_size)]  # by destination, which may be this rank
        incoming: list[list[Tensor]] = [[] for _ in range(self.world_size)]  # by source
        for name in cut:
            owner = self.owner[name]
            if owner == self.rank:
                matrices[name] = example.new_empty(self.shapes[name].numel())
            for part in self.pieces[name]:
                if part.rank == self.rank:
                    outgoing[owner].append(part.of(of_flat[id(part.flat)]))
                if owner == self.rank:
                    incoming[part.rank].append(part.of_whole(matrices[name]))
        _exchange(outgoing, incoming, example)
        self._change(matrices, update)
        _exchange(incoming, outgoing, example)

    def _change(self, matrices: Mapping[str, Tensor], update: Update) -> None:
        """Updates matrices in stacks of one shape."""
        alike: dict[torch.Size, list[str]] = {}
        for name in matrices:
            alike.setdefault(self.shapes[name], []).append(name)
        for shape, names in alike.items():
            count = matrices_at_once(shape, on_gpu=matrices[names[0]].is_cuda)
            for start in range(0, len(names), count):
                together = names[start : start + count]
                values = [matrices[name].view(shape) for name in together]
                stack = torch.stack(values) if len(values) > 1 else values[0].unsqueeze(0)
                for matrix, changed in zip(values, update(stack, together), strict=True):
                    matrix.copy_(changed)


def _exchange(sources: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]], example: Tensor) -> None:
    """Sends the sources for each rank there, and fills the targets for each rank with what comes; a collective."""
    sent, received = ([sum(part.numel() for part in parts) for parts in of_ranks] for of_ranks in (sources, targets))
    arrived = example.new_empty(sum(received))
    leaving = torch.cat([*itertools.chain(*sources), example.new_empty(0)])
    dist.all_to_all_single(arrived, leaving, received, sent)
    places = list(itertools.chain(*targets))
    for place, values in zip(places, arrived.split([place.numel() for place in places]), strict=True):
        place.copy_(values)


def _owners(held: Mapping[str, Sequence[Fragment]], shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """The rank that changes each matrix: the least busy of the ranks that hold much of it, largest matrices first."""
    costs = {name: shapes[name].numel() * min(shapes[name]) for name in held}
    work: dict[int, int] = {}
    owners: dict[str, int] = {}
    for name in sorted(held, key=lambda name: -costs[name]):
        holds: dict[int, int] = {}
        for part in held[name]:
            holds[part.rank] = holds.get(part.rank, 0) + part.numel
        candidates = [rank for rank, numel in holds.items() if 2 * numel >= max(holds.values())]
        owner = min(candidates, key=lambda rank: (work.get(rank, 0), rank))
        work[owner] = work.get(owner, 0) + costs[name]
        owners[name] = owner
    return owners
