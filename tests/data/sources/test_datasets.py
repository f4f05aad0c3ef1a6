"""Sets by name, on the hub and in folders: configurations and splits as in ``datasets``, files of one commit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from relora_mora.config.data import TextSource
from relora_mora.data.errors import SourceError
from relora_mora.data.sources import named_sets
from relora_mora.data.sources.named_sets import find_files
from tests.tools.data_tools import data_config, resolve_shards, some_texts, texts_of, write_shard
from tests.tools.each import each
from tests.tools.faulty_server import COMMIT, FAULTS, serving

CARD = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*
  - split: test
    path: en/test-*
- config_name: fr
  data_files: fr/*
---
Texts.
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch, short_waits):
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))  # its own waits
    yield
    named_sets._found.clear()


def _write_set(folder):
    """The texts by configuration and split."""
    texts = {"en/train": some_texts(40, seed=1), "en/test": some_texts(5, seed=2), "fr/train": some_texts(9, seed=3)}
    for n in range(4):
        write_shard(folder / "en" / f"train-{n}.parquet", texts["en/train"][10 * n : 10 * n + 10])
    write_shard(folder / "en" / "test-0.parquet", texts["en/test"])
    write_shard(folder / "fr" / "a.jsonl.zst", texts["fr/train"])
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "licenses.txt").write_text("none of the text", encoding="utf-8")
    return texts


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(tmp_path / "set") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        server.stall_seconds = 0.5
        server.retry_after["429"] = "0"
        yield server


def test_configurations_and_splits_by_name(tmp_path, hub):
    texts = _write_set(tmp_path / "set")
    for place in ("some/set", str(tmp_path / "set")):
        assert texts_of(f"{place}:en") == texts["en/train"]
        assert texts_of(f"{place}:en:test", "validation") == texts["en/test"]
        assert texts_of(f"{place}:fr") == texts["fr/train"]
        for source, known in {
            place: "'en', 'fr'",
            f"{place}:de": "'en', 'fr'",
            f"{place}:en:dev": "train, test",
        }.items():
            with pytest.raises(SourceError, match=f"{known}.*name .* as {place}:"):
                resolve_shards(source)
    names = [shard.name for shard in resolve_shards("some/set:en")]
    assert names == [f"hub:some/set@{COMMIT}/en/train-{n}.parquet" for n in range(4)]
    assert all(headers["authorization"] == "Bearer hf_secret" for path, headers in hub.requests if "/tree/" in path)


def test_a_folder_without_a_card_has_the_splits_in_its_file_names(tmp_path):
    for split in ("train", "validation"):
        write_shard(tmp_path / "plain" / "data" / f"{split}-00000-of-00001.parquet", [split])
    place = str(tmp_path / "plain")
    assert (texts_of(place), texts_of(place, "validation")) == (["train"], ["validation"])
    write_shard(tmp_path / "flat" / "b.jsonl", ["b"])
    write_shard(tmp_path / "flat" / "a.jsonl", ["a"])
    assert texts_of(str(tmp_path / "flat")) == ["a", "b"]
    with pytest.raises(SourceError, match=r"flat has no split validation; .* train: name one as .*/flat::train"):
        resolve_shards(str(tmp_path / "flat"), split="validation")


@each(
    "files,read,left_out",
    [
        (["a.jsonl", "b.parquet"], ["b.parquet"], "a.jsonl"),
        (["a.jsonl", "A.JSONL"], ["a.jsonl"], "A.JSONL"),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], None),
    ],
)
def test_what_datasets_leaves_out_is_named(tmp_path, caplog, files, read, left_out):
    for file in files:
        write_shard(tmp_path / "set" / file, ["a"])
    assert [shard.name for shard in resolve_shards(str(tmp_path / "set"))] == read
    assert [record.args[1] for record in caplog.records] == ([left_out] if left_out else [])


@each(
    "pattern,said",
    [
        ("*.jsonl", None),
        (["*.jsonl", "b*.jsonl"], r"no file matches .*set/b\*\.jsonl"),
        ("https://a.b/*.jsonl", "no file matches"),
        ("a.{0..1}.jsonl", "no file matches"),
    ],
)
def test_each_pattern_of_data_files_finds_something(tmp_path, pattern, said):
    write_shard(tmp_path / "set" / "a.jsonl", ["a"])
    source = TextSource(source=str(tmp_path / "set"), data_files=pattern)
    if said is None:
        assert [shard.name for shard in resolve_shards([source])] == ["a.jsonl"]
        return
    with pytest.raises(SourceError, match=said):
        resolve_shards([source])


@each(
    "card,said",
    [
        ("---\nconfigs: [\n---\n", "datasets cannot find its files"),
        ("---\nconfigs: 3\n---\n", "datasets cannot find its files"),
        ("---\nconfigs:\n- config_name: a\n  data_files: {}\n---\n", "its README names files outside of it"),
        ("---\nconfigs:\n- config_name: a\n  data_files: gone/*\n---\n", "holds no text files"),
    ],
)
def test_a_nonsensical_readme_gives_one_message(tmp_path, card, said):
    outside = write_shard(tmp_path / "outside.jsonl", ["text"])
    write_shard(tmp_path / "set" / "a.jsonl", ["text"])
    (tmp_path / "set" / "README.md").write_text(card.replace("{}", str(outside)), encoding="utf-8")
    with pytest.raises(SourceError) as caught:
        resolve_shards(str(tmp_path / "set"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_written_by_save_to_disk_is_refused_but_not_its_files(tmp_path, hub):
    import datasets

    datasets.disable_progress_bars()
    texts = some_texts(50)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(tmp_path / "set")
    for source in (f"{tmp_path}/set", f"{tmp_path}/set/train", f"{tmp_path}/set::train", "some/set"):
        with pytest.raises(SourceError, match=r"was written by save_to_disk, .*to_parquet\), or give its files by"):
            resolve_shards(source)
    assert texts_of(f"{tmp_path}/set/**/*.arrow") == texts


def test_missing_sets_on_the_hub_are_named(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.RequestHandlerClass, "do_GET", lambda handler: handler._answer(404, b"", {}))
    with pytest.raises(SourceError, match=r"hub:some/set is not a dataset on http.*check the name or path, or log"):
        resolve_shards("some/set")


def test_network_faults_do_not_change_what_is_found(tmp_path, hub):
    _write_set(tmp_path / "set")
    expected = resolve_shards("some/set:en")
    for fault in FAULTS:
        hub.faults.clear()
        hub.fault = lambda n, fault=fault: (
            fault if n % 5 == 1 else None
        )  # the three pages of the list are asked for together
        assert resolve_shards("some/set:en", timeout_seconds=60.0) == expected, fault
        assert hub.faults or fault == "cut_range"
        hub.fault = lambda n: None


def test_a_process_asks_once(tmp_path, hub, monkeypatch):
    _write_set(tmp_path / "set")
    config = data_config(["some/set:en", str(tmp_path / "set:fr"), "some/set:xx"])
    expected = resolve_shards(config.train[:2])
    find_files(config)
    monkeypatch.setattr(named_sets, "_find", lambda *given: pytest.fail("asked again"))
    before = len(hub.paths)
    assert resolve_shards(config.train[:2], COMMIT) == expected
    assert len(hub.paths) == before
    with pytest.raises(SourceError, match="'xx' not found"):
        resolve_shards(config.train, COMMIT)


def test_a_set_that_is_a_script_is_refused_as_by_datasets(tmp_path):
    """The files of dolma are lists of urls."""
    for name in ("dolma.py", "urls/v1.txt"):
        write_shard(tmp_path / "dolma" / name, ["https://example.com/a"])
    with pytest.raises(SourceError, match=r"scripts are no longer supported, but found dolma\.py"):
        resolve_shards(str(tmp_path / "dolma"))


def test_patterns_on_the_hub(tmp_path, hub):
    for name in ("a/0.jsonl", "a/1.jsonl", "b/c/2.jsonl", "b/3.txt"):
        write_shard(tmp_path / "set" / name, [name])
    of_repo = f"hub:some/set@{COMMIT}/"
    for pattern, expected in {
        "a/*": ["a/0", "a/1"],
        "**/*.jsonl": ["a/0", "a/1", "b/c/2"],
        "a/{0..1}.jsonl": ["a/0", "a/1"],
    }.items():
        for source in (f"hub:some/set/{pattern}", TextSource(source="some/set", data_files=pattern)):
            assert [shard.name for shard in resolve_shards([source])] == [f"{of_repo}{name}.jsonl" for name in expected]
    for pattern, said in {"c/*": "holds no files", "**a.txt": "is not a pattern", "/*": "is not a pattern"}.items():
        with pytest.raises(SourceError, match=said):
            resolve_shards([TextSource(source="some/set", data_files=pattern)])
