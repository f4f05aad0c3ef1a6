"""What MkDocs has to know about this repository: which files are pages, and where links to source files lead.

The site has the folders of the repository, so relative links between pages work on both. Links to files that are not
pages become links to the repository.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "*.md",
    *("configs/README.md", "tokenizer/README.md", "examples/README.md", "examples/*.py"),
    *("docs/*.md", "docs/tutorials/**/*.md", "docs/studies/*/compare.md"),
)
IMAGES = (
    *("docs/*.svg", "docs/*.png", "docs/studies/*/*.png"),
    *("docs/tutorials/**/*.svg", "docs/tutorials/**/*.png"),
)
TABLE_OF_STUDY = (
    "All columns of the table that `relora-mora compare` makes of this study. [Experiments](../../experiments.md) and "
    "[tasks](../../tasks.md) say what it shows."
)


def uris(*patterns: str) -> list[str]:
    """The files that match, as paths in the repository."""
    found = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(found)


def page_of(path: str) -> str:
    """The path of a page; the page of a script shows its source."""
    return f"{path.removesuffix('.py')}.md" if path.endswith(".py") else path


def expand(nav: list[Any]) -> list[Any]:
    """The navigation with the pages that match a path with a ``*``, and without sections that have no page."""
    entries: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and "*" in entry:
            entries += [page_of(path) for path in uris(entry)]
        elif isinstance(entry, dict):
            [(title, section)] = entry.items()
            pages = expand(section) if isinstance(section, list) else section
            entries += [{title: pages}] if pages else []
        else:
            entries.append(entry)
    return entries


def link(uri: str, target: str, repository: str, is_in_site: Callable[[str], bool]) -> str | None:
    """Where a link of the page ``uri`` leads on the site; None if it leads to the repository and that is not known."""
    file, anchor = re.fullmatch(r"([^#]*)(#.*)?", target).groups(default="")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(uri), file))
    if re.match(r"\w+:", target) or not file or is_in_site(path):
        return target
    for page in (f"{path}/README.md", page_of(path)):
        if is_in_site(page):
            return posixpath.relpath(page, posixpath.dirname(uri)) + anchor
    if not (ROOT / path).exists():
        return target  # which fails the build
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{repository.rstrip('/')}/{kind}/HEAD/{path}{anchor}" if repository else None


def rewrite(markdown: str, uri: str, repository: str, is_in_site: Callable[[str], bool]) -> str:
    """The text of a page with its links as :func:`link` gives them; code is left as it is."""

    def replace(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        target = link(uri, match["target"], repository, is_in_site)
        if match["image"]:  # opens in its own size
            return f"[{match[0]}]({target})"
        return match["text"] if target is None else f"[{match['text']}]({target})"

    code = r"(?P<code>^```.*?^```$|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)(?!\]))"
    return re.sub(
        rf"{code}|(?P<image>!)?\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]+)\)", replace, markdown, flags=re.M | re.S
    )


# ---- events of MkDocs -----------------------------------------------------------------------------------------


def on_config(config: Any) -> None:
    config.nav = expand(config.nav)


def on_files(files: Any, config: Any) -> None:
    from mkdocs.structure.files import File

    for uri in uris(*PAGES, *IMAGES):
        source: dict[str, Any] = {"abs_src_path": str(ROOT / uri)}
        if uri.endswith(".py"):
            source = {"content": f"# {posixpath.basename(uri)}\n\n```python\n{(ROOT / uri).read_text()}```\n"}
        files.append(File.generated(config, page_of(uri), **source))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    uri = page.file.src_uri
    if uri == "docs/trouble.md":
        page.meta["search"] = {"boost": 3}  # somebody who searches for "slow" has a problem
    if not markdown.startswith("# "):  # a table of a study
        page.meta["search"] = {"exclude": True}  # numbers, which hide the pages that explain
        study = posixpath.basename(posixpath.dirname(uri))
        markdown = f"# {study}\n\n{TABLE_OF_STUDY}\n\n{markdown}"
    return rewrite(markdown, uri, config.repo_url or "", lambda path: files.get_file_from_path(path) is not None)


def on_page_content(html: str, **of_page: Any) -> str:
    """Marks the words of inline code, which are not to be broken at their dots and hyphens."""

    def marked(match: re.Match[str]) -> str:
        return re.sub(r"(?<!\S)\S{2,40}(?!\S)", r'<span class="word">\g<0></span>', match[0])

    return re.sub(r"(?<=<code>)[^<\n]+(?=</code>)", marked, html)
