"""Loss spikes and bad steps, judged only from the state; a state is loaded from a checkpoint as it was saved."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from relora_mora.config.schema import TrainConfig
from relora_mora.train.loop.step import StepResult, judge
from relora_mora.train.state.run_state import Interval, RunState, StabilityState
from tests.tools.each import each
from tests.tools.tiny import tiny_config


def _config(**changes):
    return TrainConfig(run_dir="unused", **{"spike_window": 16, "spike_deviations": 4.0, **changes})


def _noisy(count: int, level: float = 3.0) -> list[float]:
    rng = random.Random(0)
    return [level + rng.gauss(0, 0.1) for _ in range(count)]


def test_a_spike_is_measured_in_standard_deviations_and_does_not_join_the_window():
    health, config = StabilityState(), _config()
    for loss in _noisy(40):
        assert health.spike(loss, config) is None
    window = list(health.losses)
    assert len(window) == 16
    mean = sum(window) / 16
    deviation = math.sqrt(sum((x - mean) ** 2 for x in window) / 15)
    assert health.spike(mean + 10 * deviation, config) == pytest.approx(10)
    assert health.losses == window
    assert health.spike(mean + 3.9 * deviation, config) is None
    assert health.spike(mean - 10 * deviation, config) is None  # a drop is not a spike


def test_nothing_is_judged_before_a_quarter_of_the_window():
    health, config = StabilityState(), _config()
    assert [health.spike(loss, config) for loss in (1.0, 100.0, 1.0, 100.0)] == [None] * 4
    assert health.spike(10_000.0, config) is not None


def test_a_lasting_rise_is_a_new_level_after_a_quarter_of_a_window():
    health, config = StabilityState(), _config()
    verdicts = [health.spike(loss, config) for loss in [*_noisy(40), 9.0, *_noisy(3), *_noisy(40, level=6.0)]]
    assert [number for number, height in enumerate(verdicts) if height is not None] == [40, 44, 45, 46, 47]
    assert health.spike(9.0, config) is not None, "judged by the new level"


@each(("stages", "steps", "rolls"), [(False, 100, True), (True, 100, False), (False, 41, False)])
def test_a_spike_is_trouble_if_the_text_is_the_same_and_a_step_is_left(monkeypatch, stages, steps, rolls):
    monkeypatch.setattr("relora_mora.train.loop.step.sum_over_hosts", lambda values: values)
    data: dict[str, Any] = {"train": [{"source": "a", "weight": 1.0}, {"source": "b", "weight": 1.0}]}
    if stages:
        data["stages"] = [{"from_step": 41, "weights": {"a": 0.0, "b": 1.0}}]
    given = {"spike_window": 16, "spike_deviations": 4.0, "on_spike": "rollback", "steps": steps}
    config = tiny_config(data=data, train=given)
    run = SimpleNamespace(engine=SimpleNamespace(rank=0, world_size=1))
    parts: Any = SimpleNamespace(config=config, run=run, metrics=SimpleNamespace(write=lambda step, values: None))
    state = RunState(initial_seed=0)
    for step, loss in enumerate([*_noisy(40), *_noisy(1, level=6.0)], 1):
        state.step = step
        result = StepResult(loss, applied=True, grad_norm=1.0, data=[])
        reason = judge(parts, state, result)
    assert (reason is not None) is rolls
    assert not state.health.bad_steps


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    """Both have lost as much in the interval."""
    monkeypatch.setattr(
        "relora_mora.train.state.run_state.sum_over_hosts", lambda values: [2 * value for value in values]
    )


def manifest(state: RunState) -> SimpleNamespace:
    counters = json.loads(json.dumps(state.dump(2)))
    return SimpleNamespace(step=state.step, data_state=state.data, counters=counters)


STATE = RunState(
    initial_seed=5,
    step=7,
    tokens=700,
    skipped_steps=2,
    rollbacks=1,
    health=StabilityState(losses=[3.0, 2.0], spikes=2, bad_steps=1, bad_data=["lane 1"]),
    interval=Interval(loss=2.5, good_steps=3, grad_norm=0.5),
    data={"0": {"row": 3}},
    saved=7,
    evaluated=7,
)


def test_a_state_is_loaded_as_it_was_saved():
    assert RunState.load(manifest(STATE), own=True) == STATE


def test_saves_and_evaluations_of_another_run_do_not_count():
    state = RunState.load(manifest(STATE), own=False)
    assert (state.saved, state.evaluated, state.rollbacks, state.step) == (None, None, 0, 7)
    assert (state.health.bad_steps, state.health.bad_data, state.health.losses) == (0, [], [3.0, 2.0])
