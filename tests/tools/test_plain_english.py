"""The counter of words that ``make lint`` uses."""

from __future__ import annotations

from tests.tools.plain_english import LIMITS, faults


def test_words_over_their_limit_are_named_with_their_rate():
    text = "\n" * 998 + "It stands there, where\nit is no fault, and stands alone. " + "if " * 100
    assert faults("code", text) == [
        '"is no" 10.0 times per 10,000 lines of code, at most 5',
        '"alone" 10.0 times per 10,000 lines of code, at most 5',
        '"stands" 20.0 times per 10,000 lines of code, at most 5',
    ]


def test_plain_text_has_no_faults():
    assert faults("docs", "If the file is missing, the command says so.\n" * 10) == []
    assert all(word.startswith(" ") for word in LIMITS)
