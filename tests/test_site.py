"""The documentation site, without building it: its pages, and where links lead. `make docs` finds broken links."""

import importlib.util
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import yaml

import relora_mora
from tests.tools.documents import DOCUMENTS, name
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more

REPOSITORY = "https://example.org/us/it"
PAGES = {"README.md", "docs/data.md", "examples/README.md", "examples/loop.md", "docs/method.svg"}


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def paths(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for page in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [page] if isinstance(page, str) else paths(page)


def test_every_page_is_in_the_navigation_once(hooks: ModuleType) -> None:
    text = re.search(r"^nav:\n(?:(?: .*)?\n)+", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert text is not None
    nav = paths(hooks.expand(yaml.safe_load(text[0])["nav"]))
    pages = {hooks.page_of(path) for path in hooks.uris(*hooks.PAGES)}
    assert pages >= {name(path) for path in DOCUMENTS}
    assert sorted(nav) == sorted({*pages, "api.md"})


def test_only_links_in_prose_are_rewritten(hooks: ModuleType) -> None:
    fence = "```python\nx = [a](relora_mora/schedule.py)\n```\n"
    text = "`[b](relora_mora)` [c](relora_mora), [`d`](relora_mora) and [e](docs/data.md)\n![f](docs/method.svg)\n"
    there = f"{REPOSITORY}/tree/HEAD/relora_mora"
    image = "[![f](docs/method.svg)](docs/method.svg)\n"
    assert hooks.rewrite(fence + text, "README.md", REPOSITORY, PAGES.__contains__) == (
        f"{fence}`[b](relora_mora)` [c]({there}), [`d`]({there}) and [e](docs/data.md)\n{image}"
    )
    assert hooks.rewrite(fence + text, "README.md", "", PAGES.__contains__) == (
        f"{fence}`[b](relora_mora)` c, `d` and [e](docs/data.md)\n{image}"
    )


def test_the_api_page_has_every_name_of_the_library() -> None:
    names = re.findall(r"^::: relora_mora\.(\w+)$", (ROOT / "docs/site/api.md").read_text(), re.MULTILINE)
    assert sorted(names) == sorted(relora_mora.__all__)
