"""Sets by name, on the hub and in folders: configurations and splits as in ``datasets``, files of one commit.

Of the hub: one request for a commit and for a list of files, the token for nobody else, one clear error for each fault.
"""

import itertools
from types import SimpleNamespace

import pytest

from relora_mora.config.data import DataConfig, TextSource
from relora_mora.data import named_sets
from relora_mora.data.errors import SourceError
from relora_mora.data.named_sets import hub_files, with_commits
from relora_mora.data.sources import configured_shards
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
    hub_files.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(tmp_path / "set") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        server.stall_seconds = 0.5
        server.retry_after["429"] = "0"
        yield server


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


def test_a_folder_without_a_card_has_the_splits_in_its_file_names(tmp_path, monkeypatch):
    for split in ("train", "validation"):
        write_shard(tmp_path / "plain" / "data" / f"{split}-00000-of-00001.parquet", [split])
    place = str(tmp_path / "plain")
    assert (texts_of(place), texts_of(place, "validation")) == (["train"], ["validation"])
    write_shard(tmp_path / "flat" / "b.jsonl", ["b"])
    write_shard(tmp_path / "flat" / "a.jsonl", ["a"])
    monkeypatch.chdir(tmp_path / "flat")
    assert texts_of(str(tmp_path / "flat")) == texts_of(".") == ["a", "b"]
    with pytest.raises(SourceError, match=r"flat has no split validation; .* train: name one as .*/flat::train"):
        resolve_shards(str(tmp_path / "flat"), split="validation")


@each(
    "files,read,left_out",
    [
        (["a.jsonl", "b.parquet"], ["b.parquet"], ["a.jsonl"]),
        (["a.jsonl", "A.JSONL"], ["a.jsonl"], ["A.JSONL"]),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], []),
    ],
)
def test_what_datasets_leaves_out_is_named(tmp_path, caplog, files, read, left_out):
    for file in files:
        write_shard(tmp_path / "set" / file, ["a"])
    assert [shard.name for shard in resolve_shards(str(tmp_path / "set"))] == read
    assert [record.args[1] for record in caplog.records] == left_out


PATTERNS = [
    ("*.jsonl", None),
    (["*.jsonl", "b*.jsonl"], r"holds no files b\*\.jsonl"),
    ("a.{0..1}.jsonl", r"holds no files a\.0\.jsonl"),
    ("../*.jsonl", r"\.\./\*\.jsonl is not a pattern of files inside of the set"),
]
CARDS = [
    ("---\nconfigs: [\n---\n", "datasets cannot find its files"),
    ("---\nconfigs: 3\n---\n", "datasets cannot find its files"),
    ("---\nconfigs:\n- config_name: a\n  data_files: {}\n---\n", "its README names files outside of it"),
    ("---\nconfigs:\n- config_name: a\n  data_files: gone/*\n---\n", "holds no text files"),
]


@each("pattern,card,said", [(each, "", said) for each, said in PATTERNS] + [(None, each, said) for each, said in CARDS])
def test_a_pattern_or_a_readme_that_finds_nothing_gives_one_message(tmp_path, pattern, card, said):
    outside = write_shard(tmp_path / "outside.jsonl", ["text"])
    write_shard(tmp_path / "set" / "a.jsonl", ["a"])
    (tmp_path / "set" / "README.md").write_text(card.replace("{}", str(outside)), encoding="utf-8")
    source = TextSource(source=str(tmp_path / "set"), data_files=pattern)
    if said is None:
        assert [shard.name for shard in resolve_shards([source])] == ["a.jsonl"]
        return
    with pytest.raises(SourceError, match=said) as caught:
        resolve_shards([source])
    assert "\n" not in str(caught.value)


@each("marker", ["dataset_dict.json", "train/state.json"])
def test_a_folder_written_by_save_to_disk_is_refused(tmp_path, hub, marker):
    write_shard(tmp_path / "set" / "train" / "0.arrow", ["text"])
    (tmp_path / "set" / marker).touch()
    for source in [f"{tmp_path}/set/train"] if "/" in marker else [f"{tmp_path}/set", f"{tmp_path}/set::train"]:
        with pytest.raises(SourceError, match=r"was written by save_to_disk; give its files, such as .*/\*\.arrow"):
            resolve_shards(source)


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_network_faults_do_not_change_what_is_found_and_a_process_asks_once(tmp_path, hub, monkeypatch):
    _write_set(tmp_path / "set")
    expected = resolve_shards("some/set:en")
    for fault in FAULTS:
        hub.faults.clear()
        hub_files.cache_clear()
        # the three pages of the list are asked for together
        hub.fault = lambda n, fault=fault: fault if n % 5 == 1 else None
        assert resolve_shards("some/set:en", timeout_seconds=60.0) == expected, fault
        assert hub.faults or fault == "cut_range"
    before = len(hub.paths)
    monkeypatch.setattr(named_sets, "list_files", lambda *given: pytest.fail("asked again"))
    assert resolve_shards("some/set:en", COMMIT, timeout_seconds=60.0) == expected
    assert len(hub.paths) == before


def test_patterns_on_the_hub(tmp_path, hub):
    for name in ("a/0.jsonl", "a/1.jsonl", "b/c/2.jsonl", "b/3.txt"):
        write_shard(tmp_path / "set" / name, [name])
    of_repo = f"hub:some/set@{COMMIT}/"
    for pattern, expected in {"**/*.jsonl": ["a/0", "a/1", "b/c/2"], "a/{0..1}.js*": ["a/0", "a/1"]}.items():
        for source in (f"hub:some/set/{pattern}", TextSource(source="some/set", data_files=pattern)):
            assert [shard.name for shard in resolve_shards([source])] == [f"{of_repo}{name}.jsonl" for name in expected]
    for pattern, said in {"c/*": "holds no files", "../*": "is not a pattern", "/*": "is not a pattern"}.items():
        with pytest.raises(SourceError, match=said):
            resolve_shards([TextSource(source="some/set", data_files=pattern)])


def test_c4_is_read_from_a_mirror_at_a_commit_that_is_asked_for_once(tmp_path, hub):
    for n in range(2):
        write_shard(tmp_path / "set" / "en" / f"c4-train.{n:05d}-of-01024.json.gz", some_texts(20, seed=n))
    known = with_commits(data_config("allenai/c4"))
    assert known.commits == {"allenai/c4@main": COMMIT}
    shards = configured_shards(known, "train")
    assert len(shards) == 1024
    assert shards[0].name.startswith(f"hub:allenai/c4@{COMMIT}/")
    assert with_commits(known) == known
    others = data_config("a.json").model_copy(update={"commits": known.commits})
    assert with_commits(others).commits == {}, "of what it does not read it knows nothing"
    assert hub.paths == ["/api/datasets/allenai/c4/revision/main"]  # nothing is listed
    DataConfig(train="a.json", validation="a.json", commits={"allenai/c4@v1@2": COMMIT})
    source = "hub:allenai/c4/en/c4-train.{00000..00001}-of-01024.json.gz"
    assert texts_of(source) == some_texts(20, seed=0) + some_texts(20, seed=1)


def test_the_token_goes_to_the_hub_and_nowhere_else_and_netrc_does_not_replace_it(hub, tmp_path, monkeypatch):
    write_shard(tmp_path / "set" / "a.jsonl", some_texts(20))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    texts_of("hub:some/set/a.jsonl")
    sent = [headers["authorization"] for path, headers in hub.requests if "/resolve/" in path]
    assert set(sent) == {"Bearer hf_secret"}
    assert "hf_secret" not in repr(resolve_shards("hub:some/set/a.jsonl"))
    hub.requests.clear()
    texts_of(f"{hub.url}/a.jsonl")
    assert hub.requests
    assert all("hf_secret" not in headers.get("authorization", "") for _, headers in hub.requests)


def test_a_login_is_retried_after_a_network_fault(hub, monkeypatch):
    def login():
        if next(failures, None):
            raise ZeroDivisionError  # any type: the library's transport has its own
        return {"authorization": "Bearer renewed"}

    monkeypatch.setattr("huggingface_hub.utils.build_hf_headers", login)
    failures = iter([True] * 2)
    resolve_shards("allenai/c4")
    assert hub.requests[-1][1]["authorization"] == "Bearer renewed"
    failures = iter(itertools.repeat(True))
    with pytest.raises(SourceError, match=r"no login to the hub \(ZeroDivisionError\)"):
        resolve_shards("allenai/c4", timeout_seconds=0.3)


@each(
    "settings,revision,said",
    [
        ({"HF_TOKEN": "hf_\u201csecret\u201d"}, "main", "hf auth login"),
        ({"HF_TOKEN": ""}, "main", "hf auth login"),  # its file is a folder
        ({"HF_ENDPOINT": "mirror.example.org"}, "main", r"HF_ENDPOINT: got 'mirror\.example\.org'"),
        ({}, "nowhere", r"\(revision nowhere\) is not a dataset on .* and data\.revision"),
        ({"fault": "off"}, "main", "hub:allenai/c4: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"),
        ({"fault": "503"}, "main", r"hub:allenai/c4 \(revision main\): gave up after 0.4 s"),
        (
            {"fault": "404"},
            "main",
            r"hub:allenai/c4 \(revision main\) is not a dataset on http.*check the name or path",
        ),
    ],
)
def test_what_is_wrong_with_the_hub_is_one_message(hub, monkeypatch, tmp_path, settings, revision, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", settings.get("fault") == "off")
    hub.fault = lambda n: "503" if settings.get("fault") == "503" else None
    if settings.get("fault") == "404":
        monkeypatch.setattr(hub.RequestHandlerClass, "do_GET", lambda handler: handler._answer(404, b"", {}))
    with pytest.raises(SourceError, match=said) as caught:
        resolve_shards("allenai/c4", revision, timeout_seconds=0.4)
    assert "secret" not in str(caught.value)
