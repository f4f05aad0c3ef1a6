"""Muon on every ZeRO stage, compared with a plain torch loop, and whole matrices from cut ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.reference import Reference, distance, losses_of, matrix_config, reference_of, small_llama
from tests.tools.grids import STAGES, rest

pytestmark = pytest.mark.distributed


# ---- the reference: one process, plain torch ----------------------------------------------------------------------


def _reference(method: str, **optim: Any) -> tuple[Reference, list[float]]:
    return reference_of(Reference, matrix_config(1, 0, method, **optim))


# ---- the engine ---------------------------------------------------------------------------------------------------


def trained(world_size: int, stage: int, method: str, bf16: bool = False, **settings: Any) -> dict[str, Any]:
    """Losses, and at the end of the run the masters, momentum and frozen weights."""
    from tests.tools.tiny import build_rig, whole_weights

    rig = build_rig(matrix_config(world_size, stage, method, **settings), bf16=bf16, llama=small_llama())
    losses = losses_of(rig, rig.config.method.merges)
    matrices = [name for name, moments in rig.engine.moments.items() if moments == ("momentum",)]
    [cut_matrices] = rig.engine.optimizer.matrices.values()
    exchanges = cut_matrices._exchanges.values()
    return {
        "losses": losses,
        "masters": {name: rig.gather(name) for name in rig.engine.moments},
        "momentum": {name: rig.gather(name, "momentum") for name in matrices},
        "frozen": whole_weights(rig.engine, rig.base.owner),
        "cut": any(exchange.is_needed for exchange in exchanges),
        "states": {
            key
            for flat in rig.engine.flats({name for name in rig.engine.parameters if "norm" in name})
            for key in rig.engine.state_of(flat)
        },
    }


CASES = [(2, "remora", stage) for stage in STAGES]
CASES += [(2, "full", 1), (2, "full", 3), (2, "relora", 2), (1, "remora", 3)]
CASES += rest(*((2, name, stage) for name in ("full", "relora") for stage in STAGES if (2, name, stage) not in CASES))
CASES += rest((1, "remora", 0), (1, "remora", 1), (1, "remora", 2))


@pytest.mark.parametrize("world,method,stage", CASES)
def test_every_stage_trains_as_plain_torch_does(pools, world, method, stage):
    reference, losses = _reference(method)
    start = {name: p.detach() for name, p in Reference(reference.config).lm.named_parameters()}
    parameters = {name: p.detach() for name, p in reference.lm.named_parameters()}
    masters = {name: parameters[name] for name in reference.parameters}
    for found in pools(world)(trained, world, stage, method):
        assert found["losses"] == pytest.approx(losses, rel=2e-6)
        assert distance(found["masters"], masters, start) < 5e-5
        assert distance(found["momentum"], reference.momentum, {}) < 2e-5
        frozen = {name: value for name, value in parameters.items() if name not in masters}
        assert distance(found["frozen"], frozen, start) < 5e-5 if frozen else not found["frozen"]
        assert found["cut"] == (world > 1 and stage > 0)
        assert found["states"] == {"exp_avg", "exp_avg_sq", "step"}


@pytest.mark.parametrize("stage", [3, *rest((0,), (1,), (2,))])
def test_without_nesterov(pools, stage):
    losses = _reference("remora", nesterov=False)[1]
    assert losses != pytest.approx(_reference("remora")[1], rel=2e-6)
    [found] = pools(1)(trained, 1, stage, "remora", nesterov=False)
    assert found["losses"] == pytest.approx(losses, rel=2e-6)


@pytest.mark.parametrize(
    "stage,zero",
    [
        (1, {"round_robin_gradients": True}),
        *rest((2, {"round_robin_gradients": True})),
        (2, {"overlap_comm": True, "reduce_bucket_size": 1000}),
        (3, {"sub_group_size": 1000, "reduce_bucket_size": 1000}),
    ],
)
def test_with_deepspeeds_own_settings(pools, stage, zero):
    for found in pools(2)(trained, 2, stage, "full", zero=zero):
        assert found["cut"]
        assert found["losses"] == pytest.approx(_reference("full")[1], rel=2e-6)


@pytest.mark.parametrize("stage", [1, 3, *rest((0,), (2,))])
def test_in_bf16_every_stage_trains_as_plain_torch_does_up_to_rounding(pools, ranks, stage):
    losses = _reference("remora")[1]
    for found in pools(ranks)(trained, ranks, stage, "remora", bf16=True):
        assert found["losses"] == pytest.approx(losses, rel=1e-3)


# ---- whole matrices -----------------------------------------------------------------------------------------------

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


def elements_owned(world_size: int) -> int:
    from tests.tools.tiny import build_rig

    rig = build_rig(matrix_config(world_size, 3, "remora"), llama=small_llama())
    rig.step(1)
    [cut_matrices] = rig.engine.optimizer.matrices.values()
    [exchange] = cut_matrices._exchanges.values()
    return sum(part.numel for parts in exchange.incoming for part in parts)


def test_the_ranks_share_the_work_if_all_matrices_are_cut(pools):
    work = pools(2)(elements_owned, 2)
    assert max(work) < 1.2 * min(work)
