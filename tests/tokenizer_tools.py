"""What the tests of the tokenizer share: the training program, and text to train on."""

from __future__ import annotations

from tests.commands import TRAIN, module_of
from tests.helpers import ROOT

training = module_of(TRAIN)


def own_text() -> list[str]:
    """Enough text for a small vocabulary wherever the tests run: the project's own sources."""
    return [path.read_text(encoding="utf-8") for folder in ("relora_mora", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
