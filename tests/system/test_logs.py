"""Words in messages."""

from __future__ import annotations

from relora_mora.system.logs import counted
from tests.tools.each import each


@each("number,text", [(0, "0 merges"), (1, "1 merge"), (2, "2 merges"), (1200, "1,200 merges")])
def test_words_are_plural_except_for_one(number: int, text: str) -> None:
    assert counted(number, "merge") == text
