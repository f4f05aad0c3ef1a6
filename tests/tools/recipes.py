"""The examples of CONTRIBUTING's recipes: copies the repository and applies all of them.

python -m tests.tools.recipes FOLDER
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.tools.helpers import ROOT

COPIED = ("relora_mora", "tests", "configs", "docs", "launch", "tokenizer")


class Patch(NamedTuple):
    """Adjacent lines of a file, before and after a change. A new file has none before."""

    recipe: str
    file: str
    before: str
    after: str

    def apply(self, root: Path) -> None:
        """Raises AssertionError if the lines are not in the file exactly once."""
        path = root / self.file
        if not self.before:
            assert not path.exists(), f"{self.recipe}: {self.file} exists already"
            path.write_text(self.after, encoding="utf-8")
            return
        text = "\n" + path.read_text(encoding="utf-8")
        count = text.count("\n" + self.before)
        assert count == 1, f"{self.recipe}: {self.file} has these lines {count} times, expected once:\n{self.before}"
        path.write_text(text.replace("\n" + self.before, "\n" + self.after)[1:], encoding="utf-8")


def patches(text: str) -> Iterator[Patch]:
    """The patches in the blocks of a page that are marked as diff, in order."""
    for section in re.split(r"^### ", text, flags=re.MULTILINE):
        recipe = section.partition("\n")[0]
        for block in re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            nothing, *parts = re.split(r"^\+\+\+ (.+)\n", block, flags=re.MULTILINE)
            assert not nothing, f"{recipe}: a file name is missing before:\n{nothing}"
            for file, body in zip(parts[::2], parts[1::2], strict=True):
                lines = body.splitlines()
                assert all(line[:1] in (" ", "+", "-") for line in lines), f"{recipe}: {body}"
                before, after = (
                    "".join(f"{line[1:]}\n" for line in lines if line[0] in kinds) for kinds in (" -", " +")
                )
                yield Patch(recipe, file, before, after)


def copy_with_recipes(folder: Path) -> Path:
    """Copies the repository into a new folder and applies all examples."""
    folder.mkdir(parents=True)
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy2(path, folder)
    for patch in patches((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        patch.apply(folder)
    return folder


if __name__ == "__main__":
    if Path(sys.argv[1]).exists():
        sys.exit(f"{sys.argv[1]} exists; give a folder that does not")
    copy_with_recipes(Path(sys.argv[1]))
