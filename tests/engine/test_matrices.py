"""Whole matrices from those that ZeRO has cut. That runs train as with whole ones is shown by tests/grid."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

SHAPES = {
    f"m{number}": torch.Size(shape) for number, shape in enumerate([(3, 4), (5, 5), (2, 9), (5, 5), (7, 1), (3, 4)])
}
FLATS = (("m0", "m1", "vector", "m2"), ("m3", "m4", "m5"))


def _values(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(SHAPES.get(name, (6,)), generator=generator)


def _less_its_mean(matrices: Tensor) -> Tensor:
    """A change that needs the whole matrix, and differs for its transpose."""
    columns = torch.arange(matrices.shape[2], dtype=matrices.dtype)
    return (matrices - matrices.mean(dim=(1, 2), keepdim=True)) * (1 + columns)


def put_together(seed: int, together: int) -> tuple[list[Tensor], list[int]]:
    """Concatenates parameters, cuts them at random between the ranks, and changes the matrices.

    Returns this rank's parts of the result, and how many matrices it changed together.
    """
    from torch import distributed as dist

    from relora_mora.engine import matrices
    from relora_mora.engine.masters import Fragment

    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    fragments: list[Fragment] = []
    gradients = {}
    for names in FLATS:
        values = torch.cat([_values(name).view(-1) for name in names])
        cuts = torch.randint(0, len(values) + 1, (world_size - 1,), generator=generator).sort().values.tolist()
        spans = list(zip([0, *cuts], [*cuts, len(values)], strict=True))
        gradient = values[slice(*spans[rank])].clone()
        flat = -gradient
        gradients[flat] = gradient
        offset = 0
        for name in names:
            for other, (begin, end) in enumerate(spans):
                left, right = max(begin, offset), min(end, offset + _values(name).numel())
                if left < right:
                    fragments.append(Fragment(other, name, left - offset, right - left, flat, left - begin))
            offset += _values(name).numel()
    counts: list[int] = []

    def update(stack: Tensor, names: Sequence[str]) -> Tensor:
        assert all(torch.equal(each, _values(name)) for name, each in zip(names, stack, strict=True))
        counts.append(len(names))
        return _less_its_mean(stack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "matrices_at_once", lambda shape, on_gpu: together)
        cut = matrices.CutMatrices(SHAPES, fragments, SHAPES, rank=rank, world_size=world_size)
        cut.replace(gradients, update)
    return list(gradients.values()), counts


def many_cuts(together: int) -> list[tuple[list[Tensor], list[int]]]:
    return [put_together(seed, together) for seed in range(40)]


@pytest.mark.distributed
@pytest.mark.parametrize("world,together", [(1, 8), (2, 1), (4, 8)])
def test_matrices_are_whole_for_every_cut(pools, world, together):
    changed = {
        name: _less_its_mean(_values(name)[None]) if name in SHAPES else _values(name) for name in sum(FLATS, ())
    }
    expected = [torch.cat([changed[name].reshape(-1) for name in names]) for names in FLATS]
    for of_ranks in zip(*pools(world)(many_cuts, together), strict=True):
        for index, values in enumerate(expected):
            assert torch.equal(torch.cat([parts[index] for parts, _ in of_ranks]), values)
        counts = [count for _, counts in of_ranks for count in counts]
        assert sum(counts) == len(SHAPES)  # each was changed by one rank
        assert together > 1 or max(counts) == 1
        if world == 1:
            assert sorted(counts) == [1, 1, 2, 2]  # those of one shape are updated together
