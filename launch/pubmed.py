"""Writes the abstracts of PubMed's dumps as text, to learn and held out: the biomedical task. See docs/tasks.md.

    python launch/pubmed.py data/biomedical --data='pubmed/pubmed*.xml.gz'

The dumps are those of NLM (ftp.ncbi.nlm.nih.gov/pubmed: baseline and updatefiles), as many as are wanted.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

try:
    from relora_mora.cli.command import run
    from relora_mora.system.files import new_folder
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None

_NO_LABEL = ("", "UNLABELLED", "UNASSIGNED")


def abstracts(file: Path) -> tuple[dict[str, str], set[str]]:
    """The abstracts of one dump by PMID, the newest version of each, and the PMIDs that it deletes or replaces.

    An article without an abstract has an empty one. Raises ValueError for what is no whole dump of PubMed.
    """
    found: dict[str, str] = {}
    deleted: set[str] = set()
    try:
        for element in _children(file):
            if element.tag == "PubmedArticle":
                found[element.findtext("MedlineCitation/PMID", "")] = abstract_of(element)
            elif element.tag == "DeleteCitation":
                deleted |= {str(pmid.text) for pmid in element.iter("PMID")}
    except (ElementTree.ParseError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: not a whole dump of PubMed (pubmed*.xml.gz): {error}; fetch it again") from error
    return {pmid: text for pmid, text in found.items() if pmid not in deleted}, deleted


def _children(file: Path) -> Iterator[ElementTree.Element]:
    """What stands below the root, one at a time: as a tree a dump takes many times its size."""
    with gzip.open(file) as content:
        events = ElementTree.iterparse(content, ("start", "end"))  # noqa: S314 - expat limits what entities grow to
        _, root = next(events)
        if root.tag != "PubmedArticleSet":
            raise ValueError(f"{file}: a <{root.tag}>, and no dump of PubMed, which is a <PubmedArticleSet>")
        depth = 0
        for event, element in events:
            depth += 1 if event == "start" else -1
            if event == "end" and depth == 0:
                yield element
                root.clear()


def abstract_of(article: ElementTree.Element) -> str:
    """The English abstract of a PubmedArticle: its parts a line each, with their labels (``RESULTS: ...``).

    Title, copyright and abstracts in other languages (OtherAbstract) are left out. Empty where there is none.
    """
    lines = []
    for part in article.iterfind("MedlineCitation/Article/Abstract/AbstractText"):
        text = " ".join("".join(_text(part)).split())
        label = part.get("Label", "").strip()
        if text:
            lines.append(text if label in _NO_LABEL else f"{label}: {text}")
    return "\n".join(lines)


def _text(element: ElementTree.Element) -> Iterator[str]:
    """The text of an element and all below it; an exponent keeps its meaning as ``10^6``."""
    if element.tag == "sup":
        yield "^"
    yield element.text or ""
    for child in element:
        yield from _text(child)
        yield child.tail or ""


def is_held_out(text: str, share: float, seed: int) -> bool:
    """By the text alone, so the same abstract is on the same side whatever files it comes with, and twice too."""
    digest = hashlib.blake2b(f"{seed}\n{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def main(out: str, *, data: str, held_out: float = 0.03, seed: int = 0) -> None:
    """Writes OUT/train.jsonl and OUT/validation.jsonl, an abstract a line: {"text": ...}.

    An article that stands in several files is taken from the newest, the last by name, and what a newer file deletes is
    left out.

    Args:
        out: the folder to write; it must be new or empty
        data: the dumps, such as 'pubmed/pubmed*.xml.gz'
        held_out: the share of abstracts for validation, above 0 and below 1; chosen by their text and the seed
        seed: of what is held out
    """
    if not 0 < held_out < 1:
        raise ValueError(f"--held_out: got {held_out}, expected a share above 0 and below 1")
    files = sorted(map(Path, glob.glob(data)), key=lambda file: file.name, reverse=True)  # noqa: PTH207
    if not files:
        raise ValueError(f"--data: no file matches {data}; give PubMed's dumps, such as 'pubmed/pubmed*.xml.gz'")
    counts = {True: 0, False: 0}  # by whether they are held out
    with (
        new_folder(Path(out)) as folder,
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "validation.jsonl").open("w", encoding="utf-8") as validation,
    ):
        for text in _newest(files):
            side = is_held_out(text, held_out, seed)
            counts[side] += 1
            (validation if side else train).write(f"{json.dumps({'text': text}, ensure_ascii=False)}\n")
        told = f"{counts[False]:,} abstracts to learn and {counts[True]:,} held out"
        if not all(counts.values()):
            raise ValueError(f"--held_out: there are {told}; give more dumps, or another share")
    print(f"wrote {told} to {out}")


def _newest(files: list[Path]) -> Iterator[str]:
    """The abstracts of dumps, the newest dump first: an article is taken where it is seen first."""
    seen: set[str] = set()  # PMIDs of newer files
    for file in files:
        found, deleted = abstracts(file)
        texts = [text for pmid, text in found.items() if text and pmid not in seen]
        print(f"{file.name}: {len(texts):,} abstracts of {len(found):,} articles", flush=True)
        yield from texts
        seen |= found.keys() | deleted


if __name__ == "__main__":
    run(main)
