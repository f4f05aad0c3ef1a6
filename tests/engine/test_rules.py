"""The contract of a rule on every ZeRO stage, compared with a plain torch loop, which has whole matrices: it gets them
whole, and its state belongs to the rank that updates the matrix and follows merges.

Two rules of one's own and 8-bit AdamW; Muon is in test_matrices.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.schema import Config
from relora_mora.optim.rules import MatrixState, new_state, shapes_of
from relora_mora.system.seeds import derived_seed
from tests.engine.reference import Reference, distance, losses_of, matrix_config, reference_of, small_llama
from tests.tools.grids import STAGES, rest
from tests.tools.rules import matrices_settings

pytestmark = pytest.mark.distributed

RULE = {"rank": 5, "every": 3, "eps": 1e-4}  # the projection is renewed at steps 1, 4 and 7


def _settings(world_size: int, stage: int, method: str, matrices: str, others: str) -> Config:
    optim = matrices_settings(matrices, **RULE)
    return matrix_config(world_size, stage, method, others=others, eps=1e-4, **optim)


class RuleReference(Reference):
    """Uses the rules themselves; the tests in tests/optim compare these with their formulas."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.states: dict[str, MatrixState] = {}
        self._forget(self.rules)

    def _forget(self, names: Any) -> None:
        for name in names:
            shapes = shapes_of(self.rules[name], *self.parameters[name].shape)
            self.states[name] = new_state(derived_seed(self.config.train.seed, name), shapes)

    @torch.no_grad()
    def _step_matrix(self, name: str, rate: float, decay: float) -> None:
        weight = self.parameters[name]
        rule, gradient = self.rules[name], weight.grad.clone()
        rule.update_moments(gradient, {"momentum": self.momentum[name]})
        weight *= 1 - rate * decay
        weight -= rate * rule.update(gradient, self.states[name])

    def merge(self, step: int) -> None:
        super().merge(step)
        self._forget(f"{name}.{key}" for name, layer in adapter_layers(self.lm) for key in layer.adapter_names)


def _reference(*settings: str) -> tuple[RuleReference, list[float]]:
    return reference_of(RuleReference, _settings(1, 0, *settings))


def trained(world_size: int, stage: int, method: str, matrices: str, others: str, bf16: bool = False) -> dict[str, Any]:
    """Losses, and at the end of the run the masters and the states that this rank has."""
    from tests.tools.tiny import build_rig

    rig = build_rig(_settings(world_size, stage, method, matrices, others), bf16=bf16, llama=small_llama())
    losses = losses_of(rig, rig.config.method.merges)
    return {
        "losses": losses,
        "masters": {name: rig.gather(name) for name in rig.engine.moments},
        "states": {name: state.tensors for name, state in rig.engine.matrix_states.items()},
        "by_rules": {name for name, moments in rig.engine.moments.items() if "exp_avg" not in moments},
    }


BOTH = ("galore", "adamw8bit")  # they exchange matrices in turn
CASES: list[Any] = [(2, "full", stage, "galore", "adamw") for stage in STAGES]
CASES += [(1, "relora", 1, "galore", "adamw"), (2, "remora", 3, "apollo", "adamw"), (2, "full", 2, "apollo", "adamw")]
CASES += rest(*((2, "remora", stage, "apollo", "adamw") for stage in (0, 1, 2)), (2, "relora", 3, "galore", "adamw"))
EIGHT_BITS: list[Any] = [(2, "full", stage, "adamw", "adamw8bit") for stage in (0, 2, 3)]
EIGHT_BITS += [
    (2, "full", 1, "adamw8bit", "adamw8bit"),
    (2, "full", 3, *BOTH),
    *rest((2, "full", 1, "adamw", "adamw8bit")),
]


@pytest.mark.parametrize("world,method,stage,matrices,others", CASES)
def test_every_stage_trains_as_plain_torch_does(pools, world, method, stage, matrices, others):
    reference, losses = _reference(method, matrices, others)
    start = {name: p.detach() for name, p in RuleReference(reference.config).lm.named_parameters()}
    masters = {name: p.detach() for name, p in reference.parameters.items()}
    owners: Counter[str] = Counter()
    for found in pools(world)(trained, world, stage, method, matrices, others):
        assert found["losses"] == pytest.approx(losses, rel=2e-6)
        assert distance(found["masters"], masters, start) < 5e-5
        assert found["by_rules"] == reference.states.keys()
        owners.update(list(found["states"]))
        for name, state in found["states"].items():
            assert distance(state, reference.states[name].tensors, {}) < 2e-4, name
    assert owners == dict.fromkeys(reference.states, world if stage == 0 else 1)


@pytest.mark.parametrize("world,method,stage,matrices,others", EIGHT_BITS)
def test_eight_bits_train_on_every_stage_as_in_plain_torch(pools, world, method, stage, matrices, others):
    """Sums in another order change a few codes by one, and then a moment by a percent or more."""
    reference, losses = _reference(method, matrices, others)
    start = {name: p.detach() for name, p in RuleReference(reference.config).lm.named_parameters()}
    masters = {name: p.detach() for name, p in reference.parameters.items()}
    for found in pools(world)(trained, world, stage, method, matrices, others):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert distance(found["masters"], masters, start) < 1e-3
        for name, state in found["states"].items():
            expected = reference.states[name].tensors
            assert {key: value.dtype for key, value in state.items()} == {
                key: value.dtype for key, value in expected.items()
            }
            for key, value in expected.items():
                if key.endswith("codes"):
                    assert (state[key].double() - value.double()).abs().mean() < 0.05, (name, key)
                else:
                    assert distance({key: state[key]}, {key: value}, {}) < 1e-2, (name, key)


@pytest.mark.parametrize("stage", [3, *rest((0,), (1,), (2,))])
def test_in_bf16_it_trains_as_plain_torch_does_up_to_rounding(pools, stage):
    losses = _reference("full", *BOTH)[1]
    for found in pools(2)(trained, 2, stage, "full", *BOTH, bf16=True):
        assert found["losses"] == pytest.approx(losses, rel=3e-3)


def reset(world_size: int, mode: str, matrices: str) -> list[tuple[int, int]]:
    """How many matrices have a state, and how many of these states are zero, before a merge and after it."""
    from tests.tools.tiny import build_rig

    config = _settings(world_size, 2, "remora", matrices, "adamw")
    config = config.model_copy(update={"method": config.method.model_copy(update={"reset": mode})})
    rig = build_rig(config, llama=small_llama())
    rig.step(1)
    counts = []
    for _ in range(2):
        states = rig.engine.matrix_states.values()
        counts.append((len(states), sum(not any(value.any() for value in state.values()) for state in states)))
        if len(counts) == 1:
            rig.merge(4)
    return counts


@pytest.mark.parametrize("matrices", ["galore", "apollo", "adamw8bit"])
@pytest.mark.parametrize("mode", ["full", "none"])
def test_a_merge_drops_the_states_of_adapters_or_keeps_them(pools, mode, matrices):
    for (held, zero), after in pools(2)(reset, 2, mode, matrices):
        assert held > 0
        assert zero == 0
        assert after == (held, held if mode == "full" else 0)


def tied_embeddings(world_size: int, stage: int) -> tuple[list[float], set[str]]:
    """Losses, and the matrices whose state this rank has."""
    from tests.tools.tiny import build_rig, tiny_llama

    config = _settings(world_size, stage, "full", "adamw", "adamw8bit")
    rig = build_rig(config, llama=tiny_llama(tie_word_embeddings=True))
    return losses_of(rig, merges=False), set(rig.engine.matrix_states)


@pytest.mark.parametrize("stage", [1, 3])
def test_tied_embeddings_are_one_matrix(pools, stage):
    [(expected, names)] = pools(1)(tied_embeddings, 1, 0)
    assert names == {"model.embed_tokens.weight"}
    states = []
    for losses, owned in pools(2)(tied_embeddings, 2, stage):
        assert losses == pytest.approx(expected, rel=1e-5)
        states += owned
    assert states == list(names)
