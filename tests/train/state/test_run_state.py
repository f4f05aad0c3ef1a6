"""A state is loaded from a checkpoint as it was saved."""

import json
from types import SimpleNamespace

import pytest

from relora_mora.train.state.run_state import Interval, RunState


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
    bad_steps=1,
    bad_data=["lane 1"],
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
    assert (state.bad_steps, state.bad_data) == (0, [])
