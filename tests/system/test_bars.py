"""Bars: only on a terminal, only on the first rank, only after a while, and gone at the end."""

import io
import os
import pty
import re
import select
import sys
import time
from collections.abc import Callable

import pytest

from relora_mora.system import bars
from relora_mora.system.bars import Bar
from relora_mora.system.process import many_imports
from tests.tools.helpers import Terminal


def until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


def test_a_terminal_shows_count_rate_and_time_left_and_no_bar_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(bars, "_TICK_SECONDS", 0.005)
    with Bar("evaluation", "token", after=0.0) as bar:
        bar.update(500, 1000)
        bar.note("a note")
        assert until(lambda: "a note" in terminal.getvalue())
        for seconds, rate in ((0.5, "0 token/s"), (1e4, "s/ token")):  # many a second, and many seconds for one
            bar._begin = time.time() - seconds
            assert until(lambda rate=rate: rate in terminal.getvalue())
        assert re.search(r"evaluation:  50%.* 500/1000 \[\d\d:\d\d<\d\d:\d\d", terminal.getvalue())
        bar.restart(10)
        bar.update(1_000_000, 2_000_000)
        assert until(lambda: "1.00M/2.00M" in terminal.getvalue())
    shown = terminal.getvalue()
    assert shown.endswith(" \r")
    assert not bar._thread.is_alive()
    with Bar("loading", after=0.0):
        assert until(lambda: "loading: 00:00" in terminal.getvalue())
    with Bar("reading", "row") as bar:
        assert list(bar.over("abc")) == ["a", "b", "c"]
    assert "reading" not in terminal.getvalue(), "it took less than two seconds"


def test_files_other_ranks_and_hidden_bars_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, rank, show in ((io.StringIO(), "0", True), (Terminal(), "1", True), (Terminal(), "0", False)):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("RANK", rank)
        with Bar("evaluation", "token", after=0.0, show=show) as bar:
            bar.update(5, 10)
            assert not bar._thread.is_alive(), (stream, rank, show)
        assert stream.getvalue() == ""


def test_slow_imports_have_a_line_on_a_real_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with many_imports():
            assert select.select([ours], [], [], 20)[0]
            assert os.read(ours, 1000).startswith(b"\rloading libraries: 00:00")
    os.close(ours)
