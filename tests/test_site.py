"""The documentation site, without building it. `make docs` finds pages outside the navigation, and broken links."""

import re
import runpy

import pytest

import relora_mora
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more

REPOSITORY = "https://example.org/us/it"
PAGES = {"README.md", "docs/data.md", "examples/README.md", "examples/loop.md", "docs/method.svg"}


def test_only_links_in_prose_are_rewritten() -> None:
    rewrite = runpy.run_path(str(ROOT / "docs/site/hooks.py"))["rewrite"]
    fence = "```python\nx = [a](relora_mora/schedule.py)\n```\n"
    text = "`[b](relora_mora)` [c](relora_mora), [`d`](relora_mora) and [e](docs/data.md)\n![f](docs/method.svg)\n"
    there = f"{REPOSITORY}/tree/HEAD/relora_mora"
    image = "[![f](docs/method.svg)](docs/method.svg)\n"
    assert rewrite(fence + text, "README.md", REPOSITORY, PAGES.__contains__) == (
        f"{fence}`[b](relora_mora)` [c]({there}), [`d`]({there}) and [e](docs/data.md)\n{image}"
    )
    assert rewrite(fence + text, "README.md", "", PAGES.__contains__) == (
        f"{fence}`[b](relora_mora)` c, `d` and [e](docs/data.md)\n{image}"
    )


def test_the_api_page_has_every_name_of_the_library() -> None:
    names = re.findall(r"^::: relora_mora\.(\w+)$", (ROOT / "docs/site/api.md").read_text(), re.MULTILINE)
    assert sorted(names) == sorted(relora_mora.__all__)
