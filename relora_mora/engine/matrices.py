"""Gives optimizers whole matrices, which ZeRO has cut into flat tensors on several ranks.

A rule updates units: single matrices, or the pairs of LoRA's layers. A unit that is whole on one rank is updated there.
The pieces of a cut unit go to its owner, one of the ranks that hold it, and come back changed. This takes two
all-to-all exchanges per call of the optimizer, or three if the rule also needs the values of the matrices, and only
pieces of cut units are sent. At stages 1 and 2 those are the units at the borders between ranks; at stage 3 all units
are cut, and at stage 0 none.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from deepspeed import comm as dist
from torch import Tensor

from relora_mora.engine.masters import Fragment
from relora_mora.optim.groups import units_at_once
from relora_mora.optim.rules import Unit

Update = Callable[[Sequence[Tensor], Sequence[Unit]], Sequence[Tensor]]


class Piece(NamedTuple):
    """The part of a matrix that a rank holds."""

    rank: int
    fragment: Fragment


class Placed(NamedTuple):
    """Where the pieces of a unit are; the rank ``owner`` changes it."""

    unit: Unit
    shapes: tuple[torch.Size, ...]
    pieces: Sequence[Piece]
    owner: int

    @property
    def is_cut(self) -> bool:
        return len({piece.rank for piece in self.pieces}) > 1


class CutMatrices:
    """The ``units`` of an engine, for its optimizer.

    ``fragments`` has what each rank owns, with flat tensors of this ``rank``, in the engine's order, which is the same
    on all ranks. ``owned`` has the names of the matrices that this rank changes; at stage 0 every rank changes all.
    ``with_values``: the rule needs the values of the matrices.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        fragments: Mapping[int, Iterable[Fragment]],
        shapes: Mapping[str, torch.Size],
        *,
        rank: int,
        world_size: int,
        with_values: bool = False,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.with_values = with_values
        pieces: dict[str, list[Piece]] = {}
        for holder, parts in fragments.items():
            for part in parts:
                pieces.setdefault(part.name, []).append(Piece(holder, part))
        held = {unit: [piece for name in unit.names for piece in pieces[name]] for unit in units}
        owners = _owners(held, shapes)
        self.owned = [name for unit, owner in owners.items() if owner == rank for name in unit.names]
        self._of_flat: dict[int, list[Placed]] = {}
        for unit, of_unit in held.items():
            placed = Placed(unit, tuple(shapes[name] for name in unit.names), of_unit, owners[unit])
            self._of_flat.setdefault(id(of_unit[0].fragment.flat), []).append(placed)
        self._exchanges: dict[tuple[int, ...], Exchange] = {}

    def check_subgroups(self) -> None:
        """Raises a ValueError if ZeRO-3 steps the matrices of a unit in different subgroups, one after the other."""
        for placed in itertools.chain(*self._of_flat.values()):
            if len({id(piece.fragment.flat) for piece in placed.pieces}) > 1:
                raise ValueError(
                    f"train.deepspeed: zero_optimization.sub_group_size separates {' and '.join(placed.unit.names)}, "
                    "which this optim.matrices updates together; raise it to more than the adapters' elements"
                )

    @torch.no_grad()
    def replace(self, gradients: Mapping[Tensor, Tensor], update: Update) -> None:
        """Replaces all matrices in the gradients, which are keyed by flat tensor.

        ``update`` gets the matrices of k units of one shape and scale, as one stack [k, m, n] for each matrix of a
        unit, followed by stacks of their values if the rule needs these. It returns the new values of the first stacks.
        This is a collective if a unit is cut: all ranks call it for the same flat tensors.
        """
        flats = tuple(id(flat) for flat in gradients)
        if flats not in self._exchanges:
            placed = [each for flat in flats for each in self._of_flat.get(flat, ())]
            self._exchanges[flats] = Exchange(placed, self.rank, self.world_size)
        values = {id(flat): flat for flat in gradients} if self.with_values else None
        self._exchanges[flats].replace({id(flat): each for flat, each in gradients.items()}, values, update)


class Exchange:
    """Sends the units of some flat tensors to their owners and back."""

    def __init__(self, units: Sequence[Placed], rank: int, world_size: int) -> None:
        self.whole = [unit for unit in units if unit.owner == rank and not unit.is_cut]
        self.cut = [unit for unit in units if unit.is_cut]
        self.owned = [unit for unit in self.cut if unit.owner == rank]
        self.is_needed = bool(self.cut)
        # pieces by destination rank and by source rank (maybe this one)
        self.outgoing: list[list[Fragment]] = [[] for _ in range(world_size)]
        self.incoming: list[list[Fragment]] = [[] for _ in range(world_size)]
        for unit in self.cut:
            for piece in unit.pieces:
                if piece.rank == rank:
                    self.outgoing[unit.owner].append(piece.fragment)
                if unit.owner == rank:
                    self.incoming[piece.rank].append(piece.fragment)
        self.sent_to = [sum(part.numel for part in parts) for parts in self.outgoing]  # elements
        self.received_from = [sum(part.numel for part in parts) for parts in self.incoming]

    def replace(self, gradients: Mapping[int, Tensor], values: Mapping[int, Tensor] | None, update: Update) -> None:
        """See :meth:`CutMatrices.replace`; gradients, and values if the rule needs them, by the id of flat tensors."""
        sources = [gradients] if values is None else [gradients, values]
        whole = [
            (unit, [part.of(source[id(part.flat)]) for source in sources for _, part in unit.pieces])
            for unit in self.whole
        ]
        if not self.is_needed:
            _change(whole, update)
            return
        assembled = [self._assemble(source) for source in sources]
        cut = [(unit, [matrices[name] for matrices in assembled for name in unit.unit.names]) for unit in self.owned]
        _change([*whole, *cut], update)
        self._give_back(assembled[0], gradients)

    def _assemble(self, source: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The whole matrices that this rank owns, flattened, from all ranks' pieces of flat tensors."""
        example = next(iter(source.values()))
        leaving = [part.of(source[id(part.flat)]) for parts in self.outgoing for part in parts]
        arriving = [part for parts in self.incoming for part in parts]
        received = example.new_empty(sum(self.received_from))
        sent = torch.cat([*leaving, example.new_empty(0)])
        dist.all_to_all_single(received, sent, self.received_from, self.sent_to)
        shapes = {name: shape for unit in self.owned for name, shape in zip(unit.unit.names, unit.shapes, strict=True)}
        matrices = {name: example.new_empty(shape.numel()) for name, shape in shapes.items()}
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


def _change(units: Iterable[tuple[Placed, list[Tensor]]], update: Update) -> None:
    """Updates units, whose matrices (and values) come flattened, in stacks of one shape."""
    alike: dict[tuple[tuple[torch.Size, ...], float], list[tuple[Unit, list[Tensor]]]] = {}
    for placed, flat in units:
        repeated = placed.shapes * (len(flat) // len(placed.shapes))
        matrices = [values.view(shape) for values, shape in zip(flat, repeated, strict=True)]
        alike.setdefault((placed.shapes, placed.unit.product_scale), []).append((placed.unit, matrices))
    for (shapes, _), members in alike.items():
        count = units_at_once(shapes, on_gpu=members[0][1][0].is_cuda)
        for start in range(0, len(members), count):
            together, matrices_of = zip(*members[start : start + count], strict=True)
            columns = list(zip(*matrices_of, strict=True))
            stacks = [torch.stack(each) if len(each) > 1 else each[0].unsqueeze(0) for each in columns]
            for column, changed in zip(columns, update(stacks, together), strict=False):
                for values, new in zip(column, changed, strict=True):
                    values.copy_(new)


def _owners(held: Mapping[Unit, Sequence[Piece]], shapes: Mapping[str, torch.Size]) -> dict[Unit, int]:
    """The rank that changes each unit: the least busy of the ranks that hold much of it, largest units first."""
    costs = {unit: sum(shapes[name].numel() * min(shapes[name]) for name in unit.names) for unit in held}
    work: dict[int, int] = {}
    owners: dict[Unit, int] = {}
    for unit in sorted(held, key=lambda unit: -costs[unit]):
        holds: dict[int, int] = {}
        for rank, fragment in held[unit]:
            holds[rank] = holds.get(rank, 0) + fragment.numel
        candidates = [rank for rank, numel in holds.items() if 2 * numel >= max(holds.values())]
        owner = min(candidates, key=lambda rank: (work.get(rank, 0), rank))
        work[owner] = work.get(owner, 0) + costs[unit]
        owners[unit] = owner
    return owners
