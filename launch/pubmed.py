"""Writes training and held-out text of the biomedical task: the abstracts in PubMed's dumps. See docs/tasks.md.

    python launch/pubmed.py data/biomedical --data='pubmed/pubmed*.xml.gz'

NLM provides the dumps (ftp.ncbi.nlm.nih.gov/pubmed: baseline and updatefiles); any number of them will do.
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
    """The newest version of each abstract in a dump, by PMID, and the PMIDs that the dump deletes or replaces.

    An article without an abstract has an empty one. Raises ValueError for a file that is not a complete PubMed dump.
    """
    texts: dict[str, str] = {}
    deleted: set[str] = set()
    try:
        for element in _children(file):
            if element.tag == "PubmedArticle":
                texts[element.findtext("MedlineCitation/PMID", "")] = abstract_of(element)
            elif element.tag == "DeleteCitation":
                deleted |= {str(pmid.text) for pmid in element.iter("PMID")}
    except (ElementTree.ParseError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: not a complete PubMed dump (pubmed*.xml.gz): {error}; fetch it again") from error
    return {pmid: text for pmid, text in texts.items() if pmid not in deleted}, deleted


def _children(file: Path) -> Iterator[ElementTree.Element]:
    """The root's children one at a time, because a whole dump as a tree takes many times its size in memory."""
    with gzip.open(file) as content:
        events = ElementTree.iterparse(content, ("start", "end"))  # noqa: S314 - expat limits what entities grow to
        _, root = next(events)
        if root.tag != "PubmedArticleSet":
            raise ValueError(f"{file}: not a PubMed dump: got <{root.tag}>, expected <PubmedArticleSet>")
        depth = 0
        for event, element in events:
            depth += 1 if event == "start" else -1
            if event == "end" and depth == 0:
                yield element
                root.clear()


def abstract_of(article: ElementTree.Element) -> str:
    """The English abstract of a PubmedArticle, one line per part with its label (``RESULTS: ...``); "" if none.

    Title, copyright and abstracts in other languages (OtherAbstract) are left out.
    """
    lines = []
    for part in article.iterfind("MedlineCitation/Article/Abstract/AbstractText"):
        text = " ".join("".join(_text(part)).split())
        label = part.get("Label", "").strip()
        if text:
            lines.append(text if label in _NO_LABEL else f"{label}: {text}")
    return "\n".join(lines)


def _text(element: ElementTree.Element) -> Iterator[str]:
    """The text of an element and everything inside it; an exponent is written as ``10^6``."""
    if element.tag == "sup":
        yield "^"
    yield element.text or ""
    for child in element:
        yield from _text(child)
        yield child.tail or ""


def is_held_out(text: str, share: float, seed: int) -> bool:
    """Decides by the text, so an abstract gets the same answer in every set of files, and duplicates do, too."""
    digest = hashlib.blake2b(f"{seed}\n{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def main(out: str, *, data: str, held_out: float = 0.03, seed: int = 0) -> None:
    """Writes OUT/train.jsonl and OUT/validation.jsonl with one abstract per line: {"text": ...}.

    An article in several files is taken from the newest file, the last by name. Articles that a newer file deletes are
    left out.

    Args:
        out: the folder to write; it must be new or empty
        data: the dumps, such as 'pubmed/pubmed*.xml.gz'
        held_out: the share of abstracts for validation, above 0 and below 1; chosen by their text and the seed
        seed: seed of that choice
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
        summary = f"{counts[False]:,} training and {counts[True]:,} held-out abstracts"
        if not all(counts.values()):
            raise ValueError(f"--held_out: there are {summary}; give more dumps, or another share")
    print(f"wrote {summary} to {out}")


def _newest(files: list[Path]) -> Iterator[str]:
    """The abstracts of dumps in the order of ``files``, each article only from the first file that has it."""
    seen: set[str] = set()  # PMIDs in newer files
    for file in files:
        by_pmid, deleted = abstracts(file)
        texts = [text for pmid, text in by_pmid.items() if text and pmid not in seen]
        print(f"{file.name}: {len(texts):,} abstracts of {len(by_pmid):,} articles", flush=True)
        yield from texts
        seen |= by_pmid.keys() | deleted


if __name__ == "__main__":
    run(main)
