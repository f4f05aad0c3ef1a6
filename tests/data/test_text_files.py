"""Text files: lines, paragraphs or whole files of bounded size, with any line ends."""

from __future__ import annotations

import gzip
import tracemalloc

import pytest

from relora_mora.data.errors import Skipped, SourceError
from tests.tools.data_tools import rows_of, some_texts, texts_of, write_shard
from tests.tools.each import each
from tests.tools.faulty_server import serving

BODY = b"\xef\xbb\xbf  first line\r\nsecond\r\n\r\n \t\r\nthird\n\n\nthe last"
DOCUMENTS = {
    "line": ["  first line", "second", "third", "the last"],
    "paragraph": ["  first line\nsecond", "third", "the last"],
    "document": ["  first line\nsecond\n\n \t\nthird\n\n\nthe last"],
}


@each("sample_by", DOCUMENTS)
@each("end", [b"", b"\n", b"\r\n", b"\n\n"])
def test_text_is_split_into_documents(tmp_path, sample_by, end):
    (tmp_path / "a.txt").write_bytes(BODY + end)
    expected = list(DOCUMENTS[sample_by])
    if sample_by == "document" and end == b"\n\n":
        expected[-1] += "\n"  # only the last newline belongs to no line
    assert texts_of(tmp_path / "a.txt", sample_by=sample_by) == expected


@each("sample_by", DOCUMENTS)
def test_documents_agree_with_datasets(tmp_path, sample_by):
    import datasets

    path = tmp_path / "a.txt"
    path.write_bytes("\n\n".join(text.replace(" the", "\r\nthe") for text in some_texts(50)).encode())
    reference = datasets.load_dataset(
        "text", data_files=str(path), sample_by=sample_by, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert texts_of(path, sample_by=sample_by) == [text for text in reference["text"] if text]


@each("sample_by", ["paragraph", "document"])
def test_a_long_document_is_never_held_in_memory(tmp_path, sample_by):
    path = write_shard(
        tmp_path / "a.txt.gz", ["first", f"{'many words on a line':200}\n".encode() * 20_000 + b"end", "last"]
    )
    tracemalloc.start()
    rows = rows_of(path, sample_by=sample_by, max_line_bytes=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    too_long = Skipped("too_long")
    assert rows == (["first", too_long, "last"] if sample_by == "paragraph" else [too_long])
    assert peak < 1 << 22


def test_the_limit_is_on_the_bytes_of_a_document(tmp_path):
    path = write_shard(tmp_path / "a.txt", ["é\n" * 9 + "é", "é\n" * 9 + "éx"])
    assert rows_of(path, max_line_bytes=29) == ["é\n" * 9 + "é", Skipped("too_long")]


def test_files_without_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b" \n\n\t\n")
    (tmp_path / "c.txt").write_text("text in UTF-16\n\nand more", encoding="utf-16")
    found = {
        sample_by: [rows_of(tmp_path / name, sample_by=sample_by) for name in ("a.txt", "b.txt", "c.txt")]
        for sample_by in DOCUMENTS
    }
    blank, utf16 = Skipped("blank_line"), Skipped("invalid_utf8")
    assert found["document"] == [[], [blank], [utf16]]
    assert found["paragraph"][:2] == [[], []]
    assert set(found["paragraph"][2]) == {utf16}
    assert found["line"][1] == [blank, Skipped("empty_text"), blank]
    assert set(found["line"][2]) >= {utf16}
    with pytest.raises(SourceError, match=r"c\.txt: 1 of 1 paragraphs are bad, .*holds a NUL byte"):
        texts_of(tmp_path / "c.txt", max_bad_fraction=0.0)


@each("name,body", [("a.txt.gz", "größer\n\ntext"), ("a.csv.gz", "id,text\n1,größer\n2,text\n")])
def test_text_that_a_server_decompressed_is_read(tmp_path, monkeypatch, name, body):
    (tmp_path / name).write_text(body, encoding="utf-8")
    with serving(tmp_path) as server:
        assert texts_of(f"{server.url}/{name}") == ["größer", "text"]
    (tmp_path / name).write_bytes(gzip.compress(body.encode(), mtime=0)[2:])  # no gzip, and no text
    with pytest.raises(SourceError, match=r"holds a NUL byte|has no column|is not"):
        texts_of(tmp_path / name, max_bad_fraction=0.0)
