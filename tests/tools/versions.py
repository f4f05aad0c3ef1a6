"""Writes the versions of a tested environment into docs/promises.md.

``make test-oldest`` and ``make test-newest`` call ``python -m tests.tools.versions KIND`` after their tests, with the
Python of their environment.
"""

from __future__ import annotations

import itertools
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata

import relora_mora
from tests.tools.helpers import ROOT

PAGE = ROOT / "docs" / "promises.md"
PACKAGES = ("torch", "deepspeed", "transformers")
HEAD = f"| release | packages | Python | {' | '.join(PACKAGES)} | date |\n|{'---|' * (len(PACKAGES) + 4)}\n"


def line_of(kind: str) -> str:
    """The line of this environment and today."""
    versions = [platform.python_version(), *map(metadata.version, PACKAGES)]
    return f"| {relora_mora.__version__} | {kind} | {' | '.join(versions)} | {datetime.now(UTC):%Y-%m-%d} |\n"


def with_line(text: str, line: str) -> str:
    """The page with a line in its table, in place of the previous one of the same release and packages."""
    before, head, after = text.partition(HEAD)
    assert head, f"{PAGE.name} has no table of tested versions"
    rest = after.splitlines(keepends=True)
    lines = list(itertools.takewhile(lambda each: each.startswith("|"), rest))
    kept = [each for each in lines if each.split("|")[1:3] != line.split("|")[1:3]]
    return before + head + "".join([*kept, line, *rest[len(lines) :]])


if __name__ == "__main__":
    PAGE.write_text(with_line(PAGE.read_text(encoding="utf-8"), line_of(sys.argv[1])), encoding="utf-8")
