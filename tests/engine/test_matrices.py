"""Whole matrices from those that ZeRO has cut. That runs train as with whole ones is shown by tests/grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.distributed

SHAPES = {
    f"m{number}": torch.Size(shape) for number, shape in enumerate([(3, 4), (5, 5), (2, 9), (5, 5), (7, 1), (3, 4)])
}
FLATS = (("m0", "m1", "vector", "m2"), ("m3", "m4", "m5"))


def _less_its_mean(matrices: Tensor) -> Tensor:
    """A change that needs the whole matrix, and differs for its transpose."""
    columns = torch.arange(matrices.shape[2], dtype=matrices.dtype)
    return (matrices - matrices.mean(dim=(1, 2), keepdim=True)) * (1 + columns)


def put_together(rank: int, world_size: int, seed: int, together: int) -> tuple[list[Tensor], list[int], list[int]]:
    """Concatenates parameters, cuts them at random between the ranks, and changes the matrices.

    Returns this rank's parts of the result, how many matrices were changed together, and how many elements it sent in
    each exchange.
    """
    from relora_mora.engine import matrices
    from relora_mora.engine.masters import Fragment

    shapes = {**SHAPES, "vector": torch.Size([6])}
    generator = torch.Generator().manual_seed(seed)
    fragments: dict[int, list[Fragment]] = {other: [] for other in range(world_size)}
    gradients = {}
    for names in FLATS:
        values = torch.cat([_values(name, shapes[name]).view(-1) for name in names])
        cuts = torch.randint(0, len(values) + 1, (world_size - 1,), generator=generator).sort().values.tolist()
        begins, ends = [0, *cuts], [*cuts, len(values)]
        gradient = values[begins[rank] : ends[rank]].clone()
        flat = -gradient
        gradients[flat] = gradient
        offset = 0
        for name in names:
            for other, (begin, end) in enumerate(zip(begins, ends, strict=True)):
                left, right = max(begin, offset), min(end, offset + shapes[name].numel())
                if left < right:
                    fragments[other].append(Fragment(name, left - offset, right - left, flat, left - begin))
            offset += shapes[name].numel()
    counts: list[int] = []
    sent: list[int] = []
    all_to_all = matrices.dist.all_to_all_single

    def update(stack: Tensor, names: Sequence[str]) -> Tensor:
        assert all(torch.equal(each, _values(name, SHAPES[name])) for name, each in zip(names, stack, strict=True))
        counts.append(len(names))
        return _less_its_mean(stack)

    def exchange(received: Tensor, given: Tensor, *sizes: Any) -> Any:
        sent.append(given.numel())
        return all_to_all(received, given, *sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "matrices_at_once", lambda shape, on_gpu: together)
        patch.setattr(matrices.dist, "all_to_all_single", exchange)
        cut = matrices.CutMatrices(SHAPES, fragments, shapes, rank=rank, world_size=world_size)
        cut.replace(gradients, update)
    holders = {
        name: {other for other in fragments for part in fragments[other] if part.name == name} for name in SHAPES
    }
    cut_names = {name for name, ranks in holders.items() if len(ranks) > 1}
    assert sent[:1] == [sum(part.numel for part in fragments[rank] if part.name in cut_names)] * bool(cut_names)
    assert len(sent) == 2 * bool(cut_names)
    return list(gradients.values()), counts, sent


def _values(name: str, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def many_cuts(world_size: int, together: int) -> list[tuple[list[Tensor], list[int], list[int]]]:
    from torch import distributed as dist

    return [put_together(dist.get_rank(), world_size, seed, together) for seed in range(40)]


@pytest.mark.parametrize("world,together", [(1, 1), (2, 1), (4, 1), (4, 8)])
def test_matrices_are_whole_for_every_cut(pools, world, together):
    """Only pieces of cut matrices are sent: once, and back."""
    changed = {name: _less_its_mean(_values(name, shape)[None]) for name, shape in SHAPES.items()}
    expected = [
        torch.cat([changed.get(name, _values(name, torch.Size([6]))).reshape(-1) for name in names]) for names in FLATS
    ]
    for of_ranks in zip(*pools(world)(many_cuts, world, together), strict=True):
        for index, values in enumerate(expected):
            assert torch.equal(torch.cat([parts[index] for parts, _, _ in of_ranks]), values)
        counts = [count for _, counts, _ in of_ranks for count in counts]
        assert sum(counts) == len(SHAPES)  # each was changed by one rank
        assert together > 1 or max(counts) == 1
        for exchanges in [sent for _, _, sent in of_ranks]:
            assert len(exchanges) == len(of_ranks[0][2])
        if of_ranks[0][2]:  # what is sent comes back
            assert sum(sent[0] for _, _, sent in of_ranks) == sum(sent[-1] for _, _, sent in of_ranks)


def test_matrices_of_one_shape_are_updated_together(pools):
    [runs] = pools(1)(many_cuts, 1, 8)
    assert all(sorted(counts) == [1, 1, 2, 2] for _, counts, _ in runs)
