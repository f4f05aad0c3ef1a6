"""Writes English text from this machine as compressed JSON lines, for the demo; needs no network.

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
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from relora_mora.system.bars import Bar
from relora_mora.system.files import new_folder

MAX_BYTES = 6_000_000  # of UTF-8 text; files are read in random order until there is as much
SHARDS = {"train": 8, "validation": 1}
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

Document = tuple[str, str]  # the file or topic that it is from, and its text


def write_text(out: Path) -> str:
    """Writes the shards, unless they are there, and says so."""
    if out.is_dir():
        return f"{out} already exists"
    from pydoc_data.topics import topics

    paths = sysconfig.get_paths()
    roots = sorted({Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")})
    reference = ((f"python://pydoc_data/topics#{name}", text) for name, text in topics.items())
    with new_folder(out) as folder:
        counts = write(chain(reference, docstrings(*roots)), folder)
    return f"{out}: {' and '.join(f'{number:,} {side} documents' for side, number in counts.items())}"


def docstrings(*roots: Path) -> Iterator[Document]:
    """The docstrings of all modules below the folders.

    Modules come in the order of a hash of their names, so that the beginning is a sample of all.
    """
    modules = {file.relative_to(root).as_posix(): file for root in roots for file in _modules(root)}
    for name in sorted(modules, key=_digest):
        yield from ((f"python://{name}", text) for text in _docstrings_of(modules[name]))


def _modules(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("test_"))


def _docstrings_of(file: Path) -> list[str]:
    try:
        source = file.read_bytes()
        # parsing is worth its time only if the text between some triple quotes is long enough
        strings = [text for quotes in (b'"""', b"'''") for text in source.split(quotes)[1::2]]
        if len(source) > _MAX_FILE_BYTES or max(map(len, strings), default=0) < MIN_CHARACTERS:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(_docstrings_below(ast.parse(source)))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):  # unreadable, or for another Python version
        return []


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.stmt):
            yield from _docstrings_below(inner)


def prose(text: str) -> str:
    """A docstring without doctests and their output, without fenced code, and without consecutive blank lines.

    Empty if what is left is short, or mostly not letters, or not English.
    """
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
    cleaned = "\n".join(kept).strip()
    words = _WORD.findall(cleaned)
    has_letters = sum(map(len, words)) >= 0.75 * len("".join(cleaned.split()))
    # unlike tables and signatures, English has function words
    is_english = len(_COMMON_WORD.findall(cleaned)) >= 0.15 * len(words)
    return cleaned if len(cleaned) >= MIN_CHARACTERS and has_letters and is_english else ""


def write(documents: Iterable[Document], out: Path, max_bytes: int = MAX_BYTES) -> dict[str, int]:
    """Writes the prose of documents to shards in a folder; returns the numbers of documents.

    Exact duplicates are dropped. A hash of the name of a file, or topic, decides whether its texts are for training or
    validation.
    Documents are distributed to the shards in turn.
    """
    sides: dict[str, dict[str, None]] = {side: {} for side in SHARDS}
    total = 0
    with Bar("collecting text", "byte") as bar:
        for source, text in documents:
            cleaned = prose(text).encode("utf-8", "replace").decode()
            if not cleaned or any(cleaned in chosen for chosen in sides.values()):
                continue
            total += len(cleaned.encode())
            if total > max_bytes:
                break
            bar.update(total, max_bytes)
            held_out = int.from_bytes(_digest(source)[:8]) < VALIDATION_FRACTION * 2**64
            sides["validation" if held_out else "train"][cleaned] = None
    for side, chosen in sides.items():
        (out / side).mkdir(parents=True)
        for shard in range(SHARDS[side]):
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in [*chosen][shard :: SHARDS[side]])
            file = out / side / f"demo-{side}.{shard:05}-of-{SHARDS[side]:05}.json.gz"
            file.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=6, mtime=0))
    return {side: len(chosen) for side, chosen in sides.items()}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
