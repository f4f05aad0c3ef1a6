"""The documents of the repository, and the command lines in them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.tools.helpers import ROOT

DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/tutorials/*.md"),
        *ROOT.glob("configs/*.md"),
        *ROOT.glob("tokenizer/*.md"),
    ]
)
# files whose comments are instructions to a user, too
INSTRUCTIONS = [
    *DOCUMENTS,
    ROOT / "Dockerfile",
    ROOT / "compose.yaml",
    *ROOT.glob("launch/slurm/*"),
    *ROOT.glob("launch/hostfile*"),
    *ROOT.glob("launch/k8s/*"),
]


def name(path: Path) -> str:
    """The path of a document as links and messages give it."""
    return str(path.relative_to(ROOT))


def blocks(text: str) -> list[str]:
    """The contents of fenced blocks of commands."""
    return [
        block
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if language in ("", "bash")
    ]
