"""A merge that cannot be right does not begin or ends the run, and its result is not saved."""

from typing import Any

import pytest
import torch

from tests.tools.grids import rest

MERGE_AT = 4


def infinite(rig: Any) -> None:
    if rig.engine.rank == 0:
        part = next(part for part in rig.engine.fragments if part.name.endswith("lora_B"))
        part.of(part.flat).fill_(float("inf"))


def missing(rig: Any) -> None:
    if rig.engine.rank == 1:
        del rig.engine.fragments_of[next(name for name in rig.engine.fragments_of if name.endswith("lora_B"))]


def too_large(rig: Any) -> None:
    names = [name for layer in rig.merger.parameters.values() for name in layer]
    rig.engine.write_masters({name: torch.full(rig.engine.shapes[name], 1e20) for name in names})


def not_reset(rig: Any) -> None:
    scatter = rig.engine.scatter
    if rig.engine.rank == 1:
        rig.engine.scatter = lambda name, value, key=None: max(0, scatter(name, value, key) - 1)


FAULTS = {fault.__name__: fault for fault in (infinite, missing, too_large, not_reset)}


def refused_merge(world_size: int, stage: int, fault: str) -> tuple[str, bool]:
    """The message, and whether the base is as it was."""
    from relora_mora.engine.merging import MergeError
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(world_size, train={"zero_stage": stage}, method={"name": "relora"}))
    rig.step(1)
    before = {name: weight.clone() for name, weight in rig.base.weights.items()}
    with torch.no_grad():
        FAULTS[fault](rig)
    with pytest.raises(MergeError) as caught:
        rig.merge(MERGE_AT)
    return str(caught.value), all(torch.equal(before[name], weight) for name, weight in rig.base.weights.items())


@pytest.mark.distributed
@pytest.mark.parametrize(
    "fault,stage,parts,unchanged",
    [
        ("too_large", 0, ("is too large for float32", "nothing of this merge was saved"), False),
        ("infinite", 3, ("not finite", ".lora_B", "nothing was merged"), True),
        *rest(
            ("too_large", 3, ("is too large for float32", "nothing of this merge was saved"), False),
            ("infinite", 2, ("not finite", ".lora_B", "nothing was merged"), True),
            ("missing", 2, ("the ranks hold ", "nothing was merged"), True),
            ("missing", 3, ("the ranks hold ", "nothing was merged"), True),
            ("not_reset", 2, ("the merge reset only ", "nothing of it was saved"), False),
        ),
    ],
)
def test_a_merge_that_cannot_be_right_is_refused_on_all_ranks(pools, fault, stage, parts, unchanged):
    first, second = pools(2)(refused_merge, 2, stage, fault)
    assert first[0] == second[0]
    assert all(part in first[0] for part in parts), first[0]
    assert {first[1], second[1]} == {unchanged}
