"""Writes English text from this machine in C4's file format, for the demo; needs no network.

The text is the language reference in ``pydoc_data.topics`` and the docstrings of the standard library and the installed
packages, read with ``ast`` (nothing is imported). The result depends only on the installed files.
"""

import ast
import gzip
import hashlib
import json
import os
import re
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from relora_mora.cli.arguments import PositiveInt
from relora_mora.cli.command import run
from relora_mora.system.bars import Bar
from relora_mora.system.files import new_folder

MARKER = "demo_text.json"
TIMESTAMP = "1970-01-01T00:00:00Z"  # docstrings have no crawl time; a constant makes the files reproducible
TRAIN_SHARDS = 8
VALIDATION_FRACTION = 0.02
MIN_CHARACTERS = 200
_MAX_FILE_BYTES = 1_000_000  # longer modules are generated tables, which are skipped
_SKIPPED_FOLDERS = {"tests", "test", "testing", "idlelib", "lib2to3", "site-packages", "__pycache__"}
_COMMON_WORD = re.compile(
    r"\b(?:an?|and|are|as|at|be|by|can|for|from|has|if|in|into|is|it|not|of|on|or|that|the|this|to|when|which|will|with)"
    r"\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

Document = dict[str, str]  # text, timestamp, url


class DemoTextError(ValueError):
    """The text cannot be written; the message says why and what to do."""


def main(*, out: str = "runs/demo/data", max_bytes: PositiveInt = 6_000_000) -> None:
    """Writes English text from this machine as json.gz shards: OUT/train (8) and OUT/validation (1).

    Options:
        out: the folder to write; a complete one is left unchanged
        max_bytes: most bytes of UTF-8 text; files are read in random order until there is as much
    """
    target = Path(out)
    marker = target / MARKER
    if os.access(marker, os.R_OK):  # it is written last
        print(f"{target}: already exists, {_summary(json.loads(marker.read_text(encoding='utf-8')))}")
        return
    started = time.monotonic()
    paths = sysconfig.get_paths()
    roots = sorted({Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")})
    with new_folder(target) as folder:
        counts = write(chain(python_reference(), docstrings(*roots)), folder, max_bytes)
    print(f"{target}: {_summary(counts)}, {time.monotonic() - started:.1f} s")


def python_reference() -> Iterator[Document]:
    """The language reference that comes with Python, one document per topic."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        cleaned = prose(text)
        if is_english(cleaned):
            yield _document(cleaned, f"python://pydoc_data/topics#{name}")


def docstrings(*roots: Path) -> Iterator[Document]:
    """The cleaned docstrings of all modules below the folders that are long enough and English.

    Modules come in the order of a hash of their names, so that the beginning is a sample of all.
    """
    modules = {file.relative_to(root).as_posix(): (root, file) for root in roots for file in _modules(root)}
    for name in sorted(modules, key=_digest):
        yield from _docstrings_of(*modules[name])


def _modules(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("test_"))


def prose(text: str) -> str:
    """A docstring without doctests and their output, without fenced code, and without consecutive blank lines."""
    kept: list[str] = []
    fenced = example = False
    for line in text.expandtabs().splitlines():
        stripped = line.strip()
        if stripped.startswith("```"):
            fenced = not fenced
            continue
        # an example includes its output, up to a blank line
        example = bool(stripped) and (example or stripped.startswith((">>>", "In [")))
        if fenced or example or (not stripped and (not kept or not kept[-1])):
            continue
        kept.append(line.rstrip())
    return "\n".join(kept).strip()


def is_english(text: str) -> bool:
    """Whether text is long enough, mostly letters, and has English function words, unlike tables and signatures."""
    if len(text) < MIN_CHARACTERS:
        return False
    words = _WORD.findall(text)
    letters = sum(map(len, words))
    common = len(_COMMON_WORD.findall(text))
    marks = len(text) - text.count(" ") - text.count("\n")
    return letters >= 0.75 * marks and common >= 0.15 * len(words)


def write(documents: Iterable[Document], out: Path, max_bytes: int) -> dict[str, Any]:
    """Writes the shards into a folder, and then the marker; returns the marker's counts.

    Exact duplicates are dropped. A hash of a file's name decides whether its docstrings are for training or validation.
    Documents are distributed to the shards in turn.
    """
    texts: set[str] = set()
    sides: dict[str, list[Document]] = {"train": [], "validation": []}
    total = 0
    with Bar("collecting text", "byte") as bar:
        for document in documents:
            size = len(document["text"].encode())
            if total + size > max_bytes:
                break
            if document["text"] not in texts:
                texts.add(document["text"])
                total += size
                bar.update(total, max_bytes)
                sides["validation" if _held_out(document) else "train"].append(document)
    if not all(sides.values()):
        raise DemoTextError(
            f"found {len(sides['train'])} training and {len(sides['validation'])} validation documents "
            f"within --max_bytes={max_bytes}; install the package with its dependencies, or raise --max_bytes"
        )
    counts = {}
    for side, chosen in sides.items():
        counts[side] = {"documents": len(chosen), "bytes": sum(len(document["text"].encode()) for document in chosen)}
        shards = TRAIN_SHARDS if side == "train" else 1
        (out / side).mkdir(parents=True)
        for shard in range(shards):
            content = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in chosen[shard::shards])
            file = out / side / f"demo-{side}.{shard:05}-of-{shards:05}.json.gz"
            file.write_bytes(gzip.compress(content.encode(), compresslevel=6, mtime=0))
    (out / MARKER).write_text(json.dumps(counts, indent=1), encoding="utf-8")
    return counts


def _docstrings_of(root: Path, file: Path) -> Iterator[Document]:
    try:
        source = file.read_bytes()
        # parsing is worth its time only if the text between some triple quotes is long enough
        strings = [text for quotes in (b'"""', b"'''") for text in source.split(quotes)[1::2]]
        if len(source) > _MAX_FILE_BYTES or max(map(len, strings), default=0) < MIN_CHARACTERS:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        found = list(_docstrings_below(tree, ""))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):  # unreadable, or for another Python version
        return
    for name, docstring in found:
        text = prose(docstring)
        if is_english(text):
            yield _document(text, f"python://{file.relative_to(root).as_posix()}#{name}")


def _docstrings_below(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield name, text
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.stmt):
            named = f"{name}.{inner.name}".lstrip(".") if isinstance(inner, _NAMED) else name
            yield from _docstrings_below(inner, named)


def _document(text: str, url: str) -> Document:
    return {"text": text.encode("utf-8", "replace").decode(), "timestamp": TIMESTAMP, "url": url}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _held_out(document: Document) -> bool:
    """Whether the document's file is for validation; a topic of the language reference counts as a file."""
    url = document["url"]
    file = url if "pydoc_data/topics" in url else url.partition("#")[0]
    return int.from_bytes(_digest(file)[:8]) < VALIDATION_FRACTION * 2**64


def _summary(counts: dict[str, Any]) -> str:
    train = counts["train"]
    validation = counts["validation"]
    return (
        f"{train['documents']:,} training documents ({train['bytes'] / 1e6:.1f} MB) "
        f"and {validation['documents']:,} validation documents ({validation['bytes'] / 1e6:.1f} MB)"
    )


if __name__ == "__main__":
    run(main)
