"""On a terminal, each of the first steps has a line; metrics are those of a run without a terminal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from relora_mora.config.schema import LogConfig
from relora_mora.train.loop import events
from relora_mora.train.state.run_state import RunState


def lines_and_metrics(monkeypatch: pytest.MonkeyPatch, *, watched: bool) -> tuple[list[str], dict[int, float]]:
    monkeypatch.setattr(events, "flops_per_token", lambda *_: SimpleNamespace(total=1.0))
    monkeypatch.setattr(events, "group_rates", lambda *_: [0.1])
    monkeypatch.setattr(events.report, "data_metrics", lambda *_: {})
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    config = SimpleNamespace(
        log=LogConfig(every_steps=4, peak_tflops=1.0),
        train=SimpleNamespace(steps=15),
        data=SimpleNamespace(is_mixture=False, sequence_length=8),
        tokens_per_step=8,
    )
    run: Any = SimpleNamespace(
        config=config,
        inputs=SimpleNamespace(model_config=None, bf16=False),
        engine=SimpleNamespace(world_size=1),
        groups=[None],
        schedule=None,
    )
    lines: list[str] = []
    metrics: dict[int, float] = {}
    progress: Any = SimpleNamespace(is_watched=watched, show=lambda text: lines.append(text.partition(",")[0]))
    written: Any = SimpleNamespace(write=lambda step, values: metrics.update({step: values["train/loss"]}))
    reporting = events.Reporting(run, written, progress)
    state = RunState(initial_seed=0)
    for state.step in range(1, 16):
        loss = float("nan") if state.step == 2 else float(state.step)  # a skipped step
        state.interval.steps += 1
        state.interval.step_seconds += 1.0
        state.interval.last_loss = loss
        if state.step != 2:
            state.interval.loss += loss
            state.interval.good_steps += 1
        reporting(state)
    return lines, metrics


def test_the_first_steps_have_a_line_each_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, metrics = lines_and_metrics(monkeypatch, watched=False)
    assert lines == [f"loss {loss:.3f}" for loss in metrics.values()]
    assert metrics == {4: 8 / 3, 8: 6.5, 12: 10.5, 15: 14.0}
    on_terminal, same = lines_and_metrics(monkeypatch, watched=True)
    assert same == metrics
    assert on_terminal == [f"loss {step:.3f}" for step in (1.0, *range(3, 11), 10.5, 14.0)]
