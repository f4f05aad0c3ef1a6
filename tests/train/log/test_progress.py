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
from relora_mora.config.schema import LogConfig
from relora_mora.system import bars
from relora_mora.system.logs import setup_logging
from relora_mora.train.log.progress import Progress, next_commands
from relora_mora.train.loop import events
from relora_mora.train.state.run_state import RunState
from tests.tools.each import each
from tests.tools.helpers import Terminal


def set_stderr(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Not as a fixture: pytest puts its own stderr back before the test."""
    monkeypatch.setattr(sys, "stderr", stream)
    setup_logging(0)
    return stream


def run_of_two_steps(monkeypatch: pytest.MonkeyPatch, *, show: bool = True) -> None:
    monkeypatch.setattr(bars, "APPEAR_SECONDS", 0.0)
    progress = Progress(4, show=show)
    progress.begin(1)
    with progress.bar("evaluation", "token") as bar:
        time.sleep(0.05 * sys.stderr.isatty())
        bar.update(3, 3)
    for step, loss in ((2, "5.0"), (3, "4.0")):
        progress.update(step)
        progress.show(step, f"loss {loss}")
    progress.close()


@each("kind", [io.StringIO, Terminal])
def test_every_line_of_the_log_is_kept(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = set_stderr(kind(), monkeypatch)
    run_of_two_steps(monkeypatch)
    output = stderr.getvalue()
    lines = re.findall(r"\d\d:\d\d:\d\d (step .*)\n", output)
    assert [line.rpartition(",")[0] for line in lines] == ["step 2/4: loss 5.0", "step 3/4: loss 4.0"]
    assert all(re.search(r"\d\d:\d\d left$", line) for line in lines)
    on_terminal = isinstance(stderr, Terminal)
    assert ("evaluation:" in output) is on_terminal
    assert ("\r" in output) is on_terminal


def test_other_ranks_print_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = set_stderr(Terminal(), monkeypatch)
    run_of_two_steps(monkeypatch, show=False)
    assert stderr.getvalue() == ""


def test_time_before_the_first_step_does_not_count_in_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([600.0, 602.0])  # the first step comes next, the line
    stderr = set_stderr(io.StringIO(), monkeypatch)
    monkeypatch.setattr("relora_mora.train.log.progress.time.monotonic", lambda: next(clock))
    progress = Progress(31, show=True)
    progress.begin(0)
    progress.show(1, "loss 5.0")
    assert stderr.getvalue().endswith("loss 5.0, 01:00 left\n")


def test_the_next_commands_are_words_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relora_mora.train.log.progress.own_command", lambda: "relora-mora")
    first, *lines = next_commands("runs/my run").splitlines()
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
        inputs=SimpleNamespace(model_config=None),
        engine=SimpleNamespace(world_size=1),
        groups=[None],
        schedule=None,
    )
    lines: list[str] = []
    metrics: dict[int, float] = {}
    progress: Any = SimpleNamespace(is_watched=watched, show=lambda _, text: lines.append(text.partition(",")[0]))
    written: Any = SimpleNamespace(write=lambda step, values: metrics.update({step: values["train/loss"]}))
    parts: Any = SimpleNamespace(run=run, config=config, metrics=written, progress=progress)
    reporting = events.Reporting(parts)
    # it takes long, so it is not measured before the first step
    monkeypatch.setattr(events, "flops_per_token", lambda *_: 1.0)
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
