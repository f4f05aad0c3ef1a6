"""The documents of the repository, and the command lines in them."""

import re
from pathlib import Path

from tests.tools.helpers import ROOT

FOLDERS = (".", "docs", "docs/tutorials", "configs", "tokenizer")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
# files whose comments are instructions to a user, too
OTHERS = ("Dockerfile", "compose.yaml", "launch/slurm/*", "launch/hostfile*", "launch/k8s/*")
INSTRUCTIONS = [*DOCUMENTS, *(path for pattern in OTHERS for path in ROOT.glob(pattern))]


def name(path: Path) -> str:
    """The path of a document as links and messages give it."""
    return str(path.relative_to(ROOT))


def blocks(text: str) -> list[str]:
    """The contents of fenced blocks of commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in ("", "bash")]
