"""Lines stay, bars are for terminals; what to do with a finished run."""

import io
import re
import shlex
import sys
import time

import pytest

from relora_mora.commands import NAMES
from relora_mora.system import bars
from relora_mora.system.logs import setup_logging
from relora_mora.train.log.progress import Progress, next_commands
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
