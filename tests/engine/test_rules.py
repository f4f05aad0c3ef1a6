"""The states of matrices belong to the rank that updates the matrix, and merges reset or keep them.

That rules get whole matrices on every stage is shown by tests/grid.
"""

from __future__ import annotations

import pytest

from tests.tools.rules import matrices_settings

pytestmark = pytest.mark.distributed

RULE = {"rank": 4, "every": 3, "eps": 1e-4}


def reset(world_size: int, mode: str, matrices: str) -> list[tuple[int, int]]:
    """How many matrices have a state, and how many of these states are zero, before a merge and after it."""
    from tests.tools.tiny import build_rig, tiny_config

    optim = matrices_settings(matrices, **RULE)
    rig = build_rig(tiny_config(world_size, method={"reset": mode}, optim=optim))
    rig.step(1)
    counts = []
    for _ in range(2):
        states = rig.engine.matrix_states.values()
        counts.append((len(states), sum(not any(value.any() for value in state.values()) for state in states)))
        if len(counts) == 1:
            rig.merge(4)
    return counts


@pytest.mark.parametrize("matrices,mode", [("galore", "none"), ("adamw8bit", "none"), ("apollo", "full")])
def test_a_merge_drops_the_states_of_adapters_or_keeps_them(pools, mode, matrices):
    owned = 0
    for (held, zero), after in pools(2)(reset, 2, mode, matrices):
        assert held > 0
        assert zero == 0
        assert after == (held, held if mode == "full" else 0)
        owned += held
    assert owned == 14
