"""Source patterns become shards, or one clear error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from relora_mora.config.data import TextSource
from relora_mora.data.content import content_of, order_fingerprint
from relora_mora.data.errors import SourceError
from relora_mora.data.shard import Shard, format_of
from relora_mora.data.sources import configured_shards, expand_braces
from tests.tools.commands import permissions_count, public_folder
from tests.tools.data_tools import data_config, resolve_shards, write_shard, write_shards
from tests.tools.each import each

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_importing_the_package_is_light():
    heavy = ("torch", "deepspeed", "transformers", "datasets", "pyarrow", "requests", "huggingface_hub")
    modules = ", ".join(
        f"relora_mora.data.{name}" for name in ("held_out", "first_rows", "stream.stream", "tokens.make")
    )
    code = f"import {modules}, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ranges_of_numbers(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example.org/")
    assert expand_braces("{08..11}") == ["08", "09", "10", "11"]
    assert expand_braces("{0..1}x{8..9}") == ["0x8", "0x9", "1x8", "1x9"]
    shards = resolve_shards("hub:some/set/data/{0..1}.jsonl", COMMIT)
    assert [shard.location for shard in shards] == [
        f"https://mirror.example.org/datasets/some/set/resolve/{COMMIT}/data/{n}.jsonl" for n in (0, 1)
    ]
    assert "mirror" not in shards[0].name


def test_local_globs_are_sorted_sources_keep_their_order_and_the_same_names_are_labelled_by_paths(tmp_path):
    for name in ("x/b.json", "x/a.json.gz", "x/c.jsonl", "x/d.jsonl.zst", "y/c.jsonl"):
        write_shard(tmp_path / name, ["text"])
    shards = resolve_shards([f"{tmp_path}/x/*", f"{tmp_path}/y/c.jsonl"])
    assert [shard.name for shard in shards] == ["a.json.gz", "b.json", "c.jsonl", "d.jsonl.zst", "c.jsonl"]
    paths = [f"{tmp_path}/x/c.jsonl", "d.jsonl.zst", f"{tmp_path}/y/c.jsonl"]
    assert [shard.label for shard in shards] == ["a.json.gz", "b.json", *paths]
    assert shards[0].size == (tmp_path / "x" / "a.json.gz").stat().st_size
    assert resolve_shards(f"{tmp_path}/y/c.jsonl") == shards[4:]


@each("pattern", ["part-{0..3}.json", "part-{0..3}*.json"])
def test_a_missing_file_of_a_range_is_named(tmp_path, pattern):
    for number in (0, 1, 3):
        write_shard(tmp_path / f"part-{number}.json", ["text"])
    missing = str(tmp_path / pattern.replace("{0..3}", "2"))
    with pytest.raises(SourceError, match=re.escape(f"no file matches {missing}; name only files that exist")):
        resolve_shards(f"{tmp_path}/{pattern}")
    assert len(resolve_shards(f"{tmp_path}/part-{{0..1}}.json")) == 2


def test_urls_show_no_secret():
    (shard,) = resolve_shards("https://user:secret@example.org/x/a.json.gz?token=secret")
    assert shard.name == "https://example.org/x/a.json.gz"
    assert "secret" in shard.location
    for wrong in ("https://user:secret@example.org/a.orc", "https://example.org/{0..1}/{3..1}.json?token=secret"):
        with pytest.raises(SourceError) as caught:
            resolve_shards(wrong)
        assert "secret" not in str(caught.value)


@each("again", ["{}/a.json", "{}/./x/../a.json", "{}/x/link.json", "{}/linked/a.json"])
def test_a_local_file_is_named_once(tmp_path, again):
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.json", ["the same text"])  # equal content, but two files
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "link.json").symlink_to("../a.json")
    (tmp_path / "linked").symlink_to(tmp_path)
    with pytest.raises(SourceError, match=r"(a|link)\.json is named already; give each file once"):
        resolve_shards([f"{tmp_path}/[ab].json", again.format(tmp_path)])


@each(
    "first,again",
    [
        ("https://example.org/x/{0..3}.json", "https://example.org/x/2.json"),
        ("allenai/c4", "hub:allenai/c4/en/c4-train.00007-of-01024.json.gz"),
        ("hub:a/b/3.json", f"https://huggingface.co/datasets/a/b/resolve/{COMMIT}/3.json"),
    ],
)
def test_a_remote_file_is_named_once(monkeypatch, first, again):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with pytest.raises(SourceError, match="is named already; give each file once"):
        resolve_shards([first, again], COMMIT)
    resolve_shards([first, "https://example.org/x/2.json?a=2", "http://example.org/x/2.json", "hub:a/c/3.json"], COMMIT)


@each(
    "source,message",
    [
        ("nowhere/*.json", "no file matches nowhere"),
        ("tests/dataset", "check the path or hub:OWNER/NAME/PATTERN"),
        (f"{Path(__file__).parent}", "holds no text files"),
        ("hub:allenai/c4", "expected hub:OWNER/NAME/PATTERN"),
        ("hub:a/b/../../x.json", "expected hub:OWNER/NAME/PATTERN"),
        ("hub:a b/c/x.json", "expected hub:OWNER/NAME/PATTERN"),
        ("https://example.org/{5..2}.json", "no file matches https://example.org/{5..2}.json"),
        ("https://example.org/{00000..99999}-of-{00000..99999}.json", "name more than 1,000,000 files; shorten"),
        ("https://example.org/a.orc", "a.orc is not a format that is read: .json, "),
        (["https://a.org/b.parquet", "https://a.org/a.arrow"], "a.arrow is an Arrow file on a server; download it"),
        ("https://[x/a.json", "not a valid url"),
        (__file__, "is not a format that is read: .json, "),
        (f"{'x' * 300}.json", "cannot be read (File name too long); check the path"),
        ([TextSource(source="a.json", revision="main")], "a.json: only a source on the hub has a revision"),
        ([TextSource(source="hub:a/b/c.json", split="validation")], "only a set by name (OWNER/NAME or a folder)"),
    ],
)
def test_a_source_without_shards_is_refused(source, message):
    with pytest.raises(SourceError, match=re.escape(message)):
        resolve_shards(source, COMMIT)


def test_files_that_cannot_be_read_are_not_shards(tmp_path):
    write_shard(tmp_path / "a.json", ["text"])
    os.mkfifo(tmp_path / "pipe.json")
    assert [shard.name for shard in resolve_shards(f"{tmp_path}/*.json")] == ["a.json"]
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name, message in {"p*.json": "no file matches .*/p.*json", "loop.json": "loop.json cannot be read"}.items():
        with pytest.raises(SourceError, match=message):
            resolve_shards(f"{tmp_path}/{name}")
    with public_folder() as folder:
        write_shard(folder / "b.json", ["text"]).chmod(0)
        message = r"b\.json cannot be read \(Permission denied\); check the path and its permissions"
        with permissions_count(), pytest.raises(SourceError, match=message):
            content_of(resolve_shards(f"{folder}/b.json"))


def test_the_fingerprint_is_of_what_a_position_means(tmp_path):
    write_shards(tmp_path / "here", 2, 5)
    write_shards(tmp_path / "there", 2, 5)
    config = data_config(tmp_path / "here" / "*.gz")

    def of(config=config, tokenizer="t", lanes=4):
        shards = configured_shards(config, "train")
        return order_fingerprint(config, tokenizer_fingerprint=tokenizer, batch_lanes=lanes, shards=shards)

    same = [
        of(),
        of(data_config(tmp_path / "there" / "*.gz")),
        of(config.model_copy(update={"workers": 3, "prefetch_batches": 9, "sequence_length": 33})),
    ]
    assert len(set(same)) == 1
    changes = {"seed": 1, "shuffle_documents": 9, "text_column": "content", "concatenate": True}
    changed = [config.model_copy(update={key: value}) for key, value in changes.items()]
    others = [*map(of, changed), of(tokenizer="u"), of(lanes=2)]
    assert len({same[0], *others}) == 1 + len(others)
    write_shard(tmp_path / "there" / "part-00001.json.gz", ["another size"])
    assert of(data_config(tmp_path / "there" / "*.gz")) == same[0]
    for name, counts in {"a.txt.gz": True, "a.json": False}.items():
        shards = [Shard("a.csv", "/x/a.csv"), Shard(name, f"/x/{name}")]
        given = {"tokenizer_fingerprint": "t", "batch_lanes": 4, "shards": shards}
        by = {order_fingerprint(data_config("unused", sample_by=sample), **given) for sample in ("line", "paragraph")}
        assert len(by) == 1 + counts


def test_the_fingerprint_does_not_change():
    """Checkpoints hold it."""
    config = data_config("unused", shuffle_documents=1024)
    shards = [Shard("a.json", "/x/a.json", size=3), Shard("b", "http://x/b")]
    given = {"tokenizer_fingerprint": "t", "batch_lanes": 4, "shards": shards}
    assert order_fingerprint(config, **given) == "e93bc9fdc325dfd902f7e93e8e95499e"


@each(
    "names,expected",
    [
        (["a.json.gz", "b.c.jsonl.zst", "a.gz", "a.x.gz", "a.ndjson", "A.JSONL"], "JSON lines"),
        (["a.txt", "a.txt.zstd"], "text"),
        (["x.gz/a.csv.zst", "a.Csv.GZ"], "CSV"),
        (["A.PARQUET"], "Parquet"),
        (["a.arrow"], "Arrow"),
        (["A.Arrow.zstd", "a.parquet.gz", "a.arrow.zst", "a", "a.tsv"], None),
    ],
)
def test_the_suffix_decides_the_format(names, expected):
    for name in names:
        found = format_of(name)
        assert (found and found.name) == expected, name
