"""Bars on a terminal and only there."""

from __future__ import annotations

import io
import sys
import time

from relora_mora.system.logs import counted, progress_bar
from tests.tools.each import each
from tests.tools.helpers import Terminal


def test_a_terminal_shows_progress_and_no_bar_remains(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("evaluation", "token") as update:
        assert "evaluation" in stream.getvalue()  # immediately
        for done in range(1, 1001):
            update(done, 1000)
            if "/1.00k" in stream.getvalue():
                break
            time.sleep(0.01)  # it is drawn again ten times a second
    assert "/1.00k [" in stream.getvalue()
    assert stream.getvalue().endswith(" \r")


@each("stream,show", [(io.StringIO(), True), (Terminal(), False)])
def test_a_file_or_a_disabled_bar_shows_no_bar(monkeypatch, stream, show):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("evaluation", "token", show=show) as update:
        update(5, 10)
    assert stream.getvalue() == ""


@each("number,text", [(0, "0 merges"), (1, "1 merge"), (2, "2 merges"), (1200, "1,200 merges")])
def test_words_are_plural_except_for_one(number: int, text: str) -> None:
    assert counted(number, "merge") == text
