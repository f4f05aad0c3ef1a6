"""Names of weights."""

from __future__ import annotations

import re
from collections.abc import Iterable


def in_short(names: Iterable[str]) -> str:
    """Names of weights; one that several layers have is named once, with a star for the layer and how often."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    return ", ".join(same[0] if len(same) == 1 else f"{kind} ({len(same)})" for kind, same in kinds.items())


def bare(name: str) -> str:
    """A weight's name without those of the models around it."""
    return re.sub(r"^(?:model\.)+", "", name)
