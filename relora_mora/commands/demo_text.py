"""Writes English text from this machine in C4's file format, for the demo; needs no network.

The text is the language reference in ``pydoc_data.topics`` and the docstrings of the standard library and the installed
packages, read with ``ast`` (nothing is imported). The result depends only on the installed files.
"""

import ast
import contextlib
import gzip
import hashlib
import json
import multiprocessing.pool
import multiprocessing.resource_tracker
import os
import re
import signal
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from relora_mora.cli.arguments import PositiveInt, Processes
from relora_mora.cli.command import run
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


def main(out: str = "runs/demo/data", max_bytes: PositiveInt = 40_000_000, processes: Processes | None = None) -> None:
    """Writes English text from this machine as json.gz shards: OUT/train (8) and OUT/validation (1).

    Options:
        out: the folder to write; a complete one is left unchanged
        max_bytes: most bytes of UTF-8 text; if there is more, a sample of the documents is kept
        processes: number of processes that read source files; default: one per core, at most 8
    """
    target = Path(out)
    done = finished(target, max_bytes)
    if done is not None:
        print(f"{target}: already exists, {_summary(done)}")
        return
    started = time.monotonic()
    paths = sysconfig.get_paths()
    roots = sorted({Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")})
    with new_folder(target) as folder:
        documents = [*python_reference(), *docstrings(roots, processes or min(8, len(os.sched_getaffinity(0))))]
        counts = write(documents, folder, max_bytes)
    print(f"{target}: {_summary(counts)}, {time.monotonic() - started:.1f} s")


def finished(out: Path, max_bytes: int) -> dict[str, Any] | None:
    """The counts of a complete text; None for an empty or missing folder. Raises DemoTextError for anything else."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        counts: dict[str, Any] = json.loads((out / MARKER).read_text(encoding="utf-8"))
        complete = all((out / name).stat().st_size == size for name, size in counts["shards"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        complete = False
    if not complete:
        raise DemoTextError(f"{out}: exists, but is not a complete demo text; remove it, or choose another --out")
    if counts["max_bytes"] != max_bytes:
        raise DemoTextError(
            f"{out}: was written with --max_bytes={counts['max_bytes']}, not {max_bytes}; "
            "remove it, or choose another --out"
        )
    return counts


def python_reference() -> Iterator[Document]:
    """The language reference that comes with Python, one document per topic."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        cleaned = prose(text)
        if is_english(cleaned):
            yield _document(cleaned, f"python://pydoc_data/topics#{name}")


def docstrings(roots: Sequence[Path], processes: int = 1) -> list[Document]:
    """The cleaned docstrings of all modules in the roots that are long enough and English, by root and path."""
    files = [(root, file) for root in roots for file in _source_files(root)]
    if processes == 1:
        return [document for file in files for document in _file_docstrings(file)]
    with _pool(processes) as pool:
        return [document for documents in pool.imap(_file_docstrings, files, chunksize=64) for document in documents]


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[multiprocessing.pool.Pool]:
    """A pool whose processes inherit a blocked SIGINT, so that only the parent handles Ctrl-C and ends them."""
    multiprocessing.resource_tracker.ensure_running()  # if it started later, it would unblock the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            yield pool
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


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
    Documents are distributed to the shards in the order of a hash of their text, so the order of ``documents`` does not
    matter.
    """
    unique: dict[bytes, Document] = {}
    for document in documents:
        key = _digest(document["text"])
        unique[key] = min(unique.get(key, document), document, key=lambda copy: copy["url"])
    sides: dict[str, list[Document]] = {"train": [], "validation": []}
    total = 0
    for _, document in sorted(unique.items()):
        size = len(document["text"].encode())
        if total + size <= max_bytes:
            total += size
            sides["validation" if _held_out(document) else "train"].append(document)
    if not all(sides.values()):
        raise DemoTextError(
            f"found {len(sides['train'])} training and {len(sides['validation'])} validation documents "
            f"within --max_bytes={max_bytes}; install the package with its dependencies, or raise --max_bytes"
        )
    counts = _write_sides(sides, out) | {"max_bytes": max_bytes}
    (out / MARKER).write_text(json.dumps(counts, indent=1), encoding="utf-8")
    return counts


def _write_sides(sides: dict[str, list[Document]], folder: Path) -> dict[str, Any]:
    counts: dict[str, Any] = {"shards": {}}
    for side, documents in sides.items():
        shards = TRAIN_SHARDS if side == "train" else 1
        counts[side] = {
            "documents": len(documents),
            "bytes": sum(len(document["text"].encode()) for document in documents),
        }
        (folder / side).mkdir(parents=True)
        for shard in range(shards):
            name = f"{side}/demo-{side}.{shard:05}-of-{shards:05}.json.gz"
            content = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents[shard::shards])
            (folder / name).write_bytes(gzip.compress(content.encode(), compresslevel=6, mtime=0))
            counts["shards"][name] = (folder / name).stat().st_size
    return counts


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("test_"):
                yield Path(folder, name)


def _file_docstrings(task: tuple[Path, Path]) -> list[Document]:
    root, file = task
    try:
        source = file.read_bytes()
        # parsing is worth its time only if the text between some triple quotes is long enough
        strings = [text for quotes in (b'"""', b"'''") for text in source.split(quotes)[1::2]]
        if len(source) > _MAX_FILE_BYTES or max(map(len, strings), default=0) < MIN_CHARACTERS:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        found = [(name, prose(text)) for name, text in _docstrings_below(tree, "")]
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):  # unreadable, or for another Python version
        return []
    url = f"python://{file.relative_to(root).as_posix()}"
    return [_document(text, f"{url}#{name}") for name, text in found if is_english(text)]


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
