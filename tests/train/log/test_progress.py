"""Lines stay, bars are for terminals, each of the first steps has a line there; what to do with a finished run."""

import io
import re
import shlex
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from relora_mora.commands import NAMES
from relora_mora.commands import pretrain as command
from relora_mora.config.schema import LogConfig
from relora_mora.system import bars
from relora_mora.system.logs import setup_logging
from relora_mora.train.loop import events
from relora_mora.train.state.run_state import RunState
from tests.tools.each import each
from tests.tools.helpers import Terminal


def set_stderr(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Not as a fixture: pytest puts its own stderr back before the test."""
    monkeypatch.setattr(sys, "stderr", stream)
    setup_logging(0)
    return stream


def reporting_of(
    monkeypatch: pytest.MonkeyPatch, *, steps: int, log: LogConfig, written: Any = None
) -> events.Reporting:
    """The reports of a run on one rank, with its bar."""
    monkeypatch.setattr(events, "group_rates", lambda *_: [0.1])
    monkeypatch.setattr(events.report, "data_metrics", lambda *_: {})
    # it takes long, so it is not measured before the first step
    monkeypatch.setattr(events, "flops_per_token", lambda *_: 1.0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    config = SimpleNamespace(
        log=log,
        train=SimpleNamespace(steps=steps),
        data=SimpleNamespace(is_mixture=False, sequence_length=8),
        tokens_per_step=8,
    )
    run: Any = SimpleNamespace(
        inputs=SimpleNamespace(model_config=None),
        engine=SimpleNamespace(world_size=1),
        groups=[None],
        schedule=None,
    )
    bar = bars.Bar("", "step", total=steps, show=log.progress)
    parts: Any = SimpleNamespace(run=run, config=config, metrics=written, steps=bar)
    return events.Reporting(parts)


def run_of_two_steps(monkeypatch: pytest.MonkeyPatch, *, show: bool = True) -> None:
    monkeypatch.setattr(bars, "APPEAR_SECONDS", 0.0)
    reporting = reporting_of(monkeypatch, steps=4, log=LogConfig(every_steps=1, peak_tflops=1.0, progress=show))
    steps = reporting.steps
    steps.restart(1)
    with bars.Bar("evaluation", "token", show=show) as bar:
        time.sleep(0.05 * sys.stderr.isatty())
        bar.update(3, 3)
    for step, loss in ((2, 5.0), (3, 4.0)):
        steps.update(step)
        reporting._show(step, loss, {"perf/tokens_per_second": 1.0})
    steps.close()


@each("kind", [io.StringIO, Terminal])
def test_every_line_of_the_log_is_kept(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = set_stderr(kind(), monkeypatch)
    run_of_two_steps(monkeypatch)
    output = stderr.getvalue()
    lines = re.findall(r"\d\d:\d\d:\d\d (step .*)\n", output)
    assert [line.partition(",")[0] for line in lines] == ["step 2/4: loss 5.000", "step 3/4: loss 4.000"]
    assert all(re.search(r"\d\d:\d\d left$", line) for line in lines)
    on_terminal = isinstance(stderr, Terminal)
    assert ("evaluation:" in output) is on_terminal
    assert ("\r" in output) is on_terminal


def test_without_progress_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = set_stderr(Terminal(), monkeypatch)
    run_of_two_steps(monkeypatch, show=False)
    assert stderr.getvalue() == ""


def test_time_before_the_first_step_does_not_count_in_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([500.0, 600.0, 602.0])  # the bar is made, the first step comes next, the line
    monkeypatch.setattr(bars, "is_watched", lambda: False)
    monkeypatch.setattr(bars.time, "time", lambda: next(clock))
    steps = bars.Bar("", "step", total=31)
    steps.restart(0)
    steps.update(1)
    assert steps.time_left() == "01:00"


def test_the_next_commands_are_words_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relora_mora.commands.pretrain.own_command", lambda: "relora-mora")
    first, *lines = command._next_commands("runs/my run").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    assert first == "next:"
    assert words == [
        ["relora-mora", "evaluate", "runs/my run"],
        ["relora-mora", "sample", "runs/my run", "The"],
        ["relora-mora", "export", "runs/my run", "runs/my run_export"],
        ["relora-mora", "board", "runs"],
    ]
    assert all(command in NAMES for _, command, *_ in words)


def lines_and_metrics(monkeypatch: pytest.MonkeyPatch, *, watched: bool) -> tuple[list[str], dict[int, float]]:
    metrics: dict[int, float] = {}
    written: Any = SimpleNamespace(write=lambda step, values: metrics.update({step: values["train/loss"]}))
    monkeypatch.setattr(events, "is_watched", lambda: watched)
    monkeypatch.setattr(bars, "is_watched", lambda: False)
    reporting = reporting_of(monkeypatch, steps=15, log=LogConfig(every_steps=4, peak_tflops=1.0), written=written)
    stderr = set_stderr(io.StringIO(), monkeypatch)
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
    return re.findall(r"loss [0-9.]+", stderr.getvalue()), metrics


def test_the_first_steps_have_a_line_each_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, metrics = lines_and_metrics(monkeypatch, watched=False)
    assert lines == [f"loss {loss:.3f}" for loss in metrics.values()]
    assert metrics == {4: 8 / 3, 8: 6.5, 12: 10.5, 15: 14.0}
    on_terminal, same = lines_and_metrics(monkeypatch, watched=True)
    assert same == metrics
    assert on_terminal == [f"loss {step:.3f}" for step in (1.0, *range(3, 11), 10.5, 14.0)]
