"""Writes what follows from the code in docs/*.md: ``python -m tests.tools.pages NAME ...``, without names in all."""

import importlib
import sys

from tests.tools.helpers import ROOT

PAGES = ("settings", "commands", "support", "models", "recipes")


def written(name: str) -> tuple[str, str]:
    """A page as it is, and with everything after its mark as the code gives it."""
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    mark = f"<!-- Written by `python -m tests.tools.pages {name}` from here on -->\n\n"
    head, found, _ = page.partition(mark)
    assert found, f"docs/{name}.md does not have the line {mark}"
    return page, head + mark + importlib.import_module(f"tests.tools.{name}_page").generated()


if __name__ == "__main__":
    for page_name in sys.argv[1:] or PAGES:
        (ROOT / "docs" / f"{page_name}.md").write_text(written(page_name)[1], encoding="utf-8")
