"""What is wrong with settings, and on which of them that judgement rests."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """``settings``: every setting that the judgement rests on, the one to change first. ``text``: the message."""

    settings: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.settings[0]}: {self.text}"
