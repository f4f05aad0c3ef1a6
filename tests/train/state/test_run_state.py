"""A state is loaded from a checkpoint as it was saved."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from relora_mora.train.loop.evaluating import Evaluating
from relora_mora.train.state.run_state import Best, Interval, RunState
from tests.tools.tiny import tiny_config


def test_a_state_is_loaded_as_it_was_saved_and_without_what_belongs_to_another_folder(monkeypatch: pytest.MonkeyPatch):
    both = "relora_mora.train.state.run_state.sum_over_hosts"
    monkeypatch.setattr(both, lambda values: [2 * value for value in values])  # two ranks, which have lost as much
    counted: dict[str, Any] = {"initial_seed": 5, "step": 7, "tokens": 700, "skipped_steps": 2}
    counted |= {"interval": Interval(loss=2.5, good_steps=3, grad_norm=0.5), "data": {"0": {"row": 3}}}
    best = Best("eval/loss", 1.5, 6, "abc")
    own = {"rollbacks": 1, "bad_steps": 1, "bad_data": ["lane 1"], "saved": 7, "evaluated": 7, "best": best}
    state = RunState(**counted, **own)
    counters = json.loads(json.dumps(state.dump(2)))
    manifest: Any = SimpleNamespace(step=7, data_state=state.data, counters=counters)
    assert RunState.load(manifest, own=True) == state
    assert RunState.load(manifest, own=False) == RunState(**counted)


def test_scores_of_other_rows_of_a_task_do_not_count_for_the_best():
    before = Best("tasks/own/acc", 0.9, 2, None)
    for limit, suffix, best in ((None, "", before), (3, "/first-3", Best("tasks/own/acc", 0.5, 4, "/first-3"))):
        config = tiny_config(eval={"tasks": ["own.yaml"], "limit": limit}, checkpoint={"keep_best": "tasks/own/acc"})
        evaluating = SimpleNamespace(config=config, tasks=SimpleNamespace(larger_is_better={"own/acc": True}))
        state = RunState(initial_seed=1, step=4, best=before)
        assert Evaluating._best(evaluating, state, {f"tasks/own/acc{suffix}": 0.5}) == best  # type: ignore[arg-type]
