"""Abstracts out of PubMed's dumps: which of them, how they are written, and on which side they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.tools.commands import call, left_in, module_of, refused

PUBMED = "launch/pubmed.py"
HEAD = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January 2019//EN" "https://dtd.nlm.nih.gov/x.dtd">
"""


def article(pmid: int, inside: str, version: int = 1) -> str:
    """With a reference and a comment that have PMIDs too."""
    return f"""<PubmedArticle><MedlineCitation><PMID Version="{version}">{pmid}</PMID>
      <Article><ArticleTitle>Title {pmid}</ArticleTitle>{inside}<Language>ger</Language></Article>
      <CommentsCorrectionsList><CommentsCorrections><PMID Version="1">777</PMID></CommentsCorrections>
      </CommentsCorrectionsList></MedlineCitation><PubmedData><ReferenceList><Reference><ArticleIdList>
      <ArticleId IdType="pubmed">778</ArticleId></ArticleIdList></Reference></ReferenceList></PubmedData>
      </PubmedArticle>
    """


def plain(pmid: int, text: str, version: int = 1) -> str:
    return article(pmid, f"<Abstract><AbstractText>{text}</AbstractText></Abstract>", version)


def write(folder: Path, name: str, *articles: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(f"{HEAD}<PubmedArticleSet>{''.join(articles)}</PubmedArticleSet>".encode()))
    return path


def texts(folder: Path, side: str = "*") -> list[str]:
    files = sorted(folder.glob(f"{side}.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def extract(folder: Path, *flags: str) -> list[str]:
    out = folder / "out"
    answer = call(PUBMED, out, f"--data={folder}/*.xml.gz", *flags)
    assert answer.code == 0, answer.err
    assert left_in(out) == ["train.jsonl", "validation.jsonl"]
    return texts(out)


@pytest.fixture
def filler() -> list[str]:
    """So many that at half of them both sides have some."""
    return [plain(1000 + number, f"filler {number}") for number in range(20)]


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("<Abstract><AbstractText>One text.</AbstractText></Abstract>", "One text."),
        (
            '<Abstract><AbstractText Label="AIMS" NlmCategory="OBJECTIVE">To see.</AbstractText>'
            '<AbstractText Label="UNLABELLED">Without.</AbstractText><AbstractText Label="NONE"/>'
            '<AbstractText Label="RESULTS">Seen.</AbstractText>'
            "<CopyrightInformation>Mine.</CopyrightInformation></Abstract>",
            "AIMS: To see.\nWithout.\nRESULTS: Seen.",
        ),
        (
            "<Abstract><AbstractText>Of <i>E. <b>coli</b></i>, 10<sup>-6</sup> M\n   in H<sub>2</sub>O &lt; "
            "&#xe9;&#8201;naïve Größe.</AbstractText></Abstract>",
            "Of E. coli, 10^-6 M in H2O < é naïve Größe.",
        ),
        ("", None),
        ("<Abstract><AbstractText/></Abstract>", None),
        ("<Abstract><AbstractText> <i> </i> </AbstractText></Abstract>", None),
        ('<OtherAbstract Language="ger"><AbstractText>Ein Text.</AbstractText></OtherAbstract>', None),
    ],
)
def test_an_abstract_as_text(tmp_path: Path, filler: list[str], inside: str, expected: str | None) -> None:
    write(tmp_path, "pubmed1.xml.gz", article(1, inside), *filler)
    found = [text for text in extract(tmp_path, "--held_out=0.5") if not text.startswith("filler")]
    assert found == ([] if expected is None else [expected])


def test_newer_files_replace_and_delete_abstracts_of_older_ones(tmp_path: Path, filler: list[str]) -> None:
    (tmp_path / "a").mkdir()
    deletion = "<DeleteCitation><PMID Version='1'>{}</PMID></DeleteCitation>"
    write(tmp_path, "pubmed1.xml.gz", *(plain(number, f"old {number}") for number in range(1, 7)), *filler)
    write(
        tmp_path,
        "pubmed2.xml.gz",
        plain(2, "new 2"),
        plain(3, "new 3, first version"),
        plain(3, "new 3, second version", version=2),
        article(4, ""),  # its abstract was withdrawn
        plain(5, "of a citation that is deleted"),
        deletion.format(5),
        deletion.format(1),
    )
    write(tmp_path, "pubmed3.xml.gz", plain(1, "back again 1"))
    found = [text for text in extract(tmp_path, "--held_out=0.5") if not text.startswith("filler")]
    assert sorted(found) == ["back again 1", "new 2", "new 3, second version", "old 6"]


def test_the_side_of_an_abstract_follows_from_its_text_and_the_seed(tmp_path: Path) -> None:
    many = [plain(number, f"text {number % 900}") for number in range(1000)]
    sides = []
    for name, dumps in (("one", [many]), ("two", [many[:500], many[500:][::-1]])):
        (tmp_path / name).mkdir()
        for number, dump in enumerate(dumps):
            write(tmp_path / name, f"pubmed{number}.xml.gz", *dump)
        assert len(extract(tmp_path / name, "--held_out=0.2")) == 1000
        sides.append([set(texts(tmp_path / name / "out", side)) for side in ("train", "validation")])
    assert sides[0] == sides[1]
    train, validation = sides[0]
    assert not train & validation
    assert 120 < len(validation) < 240  # of 900; the deviation of 180 is 12
    call(PUBMED, tmp_path / "other", f"--data={tmp_path}/one/*.xml.gz", "--held_out=0.2", "--seed=1")
    assert set(texts(tmp_path / "other", "validation")) != validation


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"no gzip", ("Not a gzipped file",)),
        (gzip.compress(b"<PubmedArticleSet><PubmedArticle>")[:-12], ("ended before the end",)),
        (gzip.compress(b"<PubmedArticleSet><PubmedArticle>"), ("no element found",)),
        (gzip.compress(b"<html></html>"), ("got <html>", "expected <PubmedArticleSet>")),
        (gzip.compress(f"{HEAD}<PubmedArticleSet>&eacute;</PubmedArticleSet>".encode()), ("undefined entity",)),
    ],
    ids=["no gzip", "cut off", "not closed", "another page", "unknown entity"],
)
def test_a_file_that_is_not_a_dump_is_named(tmp_path: Path, content: bytes, parts: tuple[str, ...]) -> None:
    (tmp_path / "pubmed1.xml.gz").write_bytes(content)
    refused(call(PUBMED, tmp_path / "out", f"--data={tmp_path}/*.xml.gz"), "pubmed1.xml.gz", *parts)
    assert left_in(tmp_path) == ["pubmed1.xml.gz"]


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path, "pubmed1.xml.gz", plain(1, "only one"))
    data = f"--data={tmp_path}/*.xml.gz"
    refused(call(PUBMED, tmp_path / "out", data), "1 training and 0 held-out abstracts")
    refused(call(PUBMED, tmp_path / "out", "--data=none/*"), "--data: no file matches none/*")
    refused(call(PUBMED, tmp_path / "out", data, "--held_out=1"), "--held_out: got 1.0, expected a share above 0")
    assert left_in(tmp_path) == ["pubmed1.xml.gz"]
    refused(call(PUBMED, tmp_path, data), str(tmp_path))


def test_a_dump_is_read_as_a_stream(tmp_path: Path) -> None:
    path = write(tmp_path, "pubmed1.xml.gz", *(plain(number, "text") for number in range(50)))
    module = module_of(PUBMED)
    kept = list(module._children(path))
    assert len(kept) == 50
    children = module._children(path)
    first = next(children)
    next(children)
    assert first.findtext("MedlineCitation/PMID") == "0"  # what was given stays whole
