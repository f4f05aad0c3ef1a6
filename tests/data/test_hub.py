"""The hub: one request for the commit of a revision, the token for nobody else, and one clear error for each fault."""

from __future__ import annotations

import itertools

import pytest

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.sources.names import with_commits
from relora_mora.data.sources.resolve import configured_shards
from tests.tools.data_tools import data_config, resolve_shards, some_texts, texts_of, write_shard
from tests.tools.each import each
from tests.tools.faulty_server import COMMIT, serving


@pytest.fixture
def hub(tmp_path, monkeypatch, short_waits):
    for split, count in (("train", 1024), ("validation", 8)):
        for n in range(2):
            write_shard(tmp_path / "en" / f"c4-{split}.{n:05d}-of-{count:05d}.json.gz", some_texts(20, seed=n))
    with serving(tmp_path) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server


def test_c4_is_read_from_a_mirror(hub):
    shards = resolve_shards("allenai/c4", "main", split="train")
    assert len(shards) == 1024
    assert shards[0].name.startswith(f"hub:allenai/c4@{COMMIT}/")
    assert hub.paths == ["/api/datasets/allenai/c4/revision/main"]  # the commit, once; nothing is listed
    source = "hub:allenai/c4/en/c4-train.{00000..00001}-of-01024.json.gz"
    assert texts_of(source) == some_texts(20, seed=0) + some_texts(20, seed=1)


def test_the_token_goes_to_the_hub_and_nowhere_else_and_netrc_does_not_replace_it(hub, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    source = "hub:allenai/c4/en/c4-train.00000-of-01024.json.gz"
    texts_of(source)
    sent = [headers["authorization"] for path, headers in hub.requests if "/resolve/" in path]
    assert set(sent) == {"Bearer hf_secret"}
    assert "hf_secret" not in repr(resolve_shards(source))
    hub.requests.clear()
    texts_of(f"{hub.url}/en/c4-train.00000-of-01024.json.gz")
    assert hub.requests
    assert all("hf_secret" not in headers.get("authorization", "") for _, headers in hub.requests)


def test_the_commit_of_a_revision_is_asked_for_once(hub):
    known = with_commits(data_config("allenai/c4"))
    assert known.commits == {"allenai/c4@main": COMMIT}
    assert len(hub.paths) == 1
    assert configured_shards(known, "train")[0].name.startswith(f"hub:allenai/c4@{COMMIT}/")
    assert with_commits(known) == known
    assert len(hub.paths) == 1
    others = data_config("a.json").model_copy(update={"commits": known.commits})
    assert with_commits(others).commits == {} and len(hub.paths) == 1, "of what it does not read it knows nothing"
    DataConfig(train="a.json", validation="a.json", commits={"allenai/c4@v1@2": COMMIT})


def test_revisions_and_files_unknown_to_the_hub(hub):
    with pytest.raises(SourceError, match="has no revision 'nowhere'"):
        resolve_shards("allenai/c4", "nowhere")
    hub.fault = lambda n: "503" if n % 2 else None
    assert len(resolve_shards("allenai/c4", "main")) == 1024


def test_a_login_is_retried_after_a_network_fault(hub, monkeypatch):
    class OtherTransportError(Exception):
        pass

    def login():
        if next(failures, None):
            raise OtherTransportError
        return {"authorization": "Bearer renewed"}

    monkeypatch.setattr("huggingface_hub.utils.build_hf_headers", login)
    failures = iter([True] * 2)
    resolve_shards("allenai/c4", "main")
    assert hub.requests[-1][1]["authorization"] == "Bearer renewed"
    failures = iter(itertools.repeat(True))
    with pytest.raises(SourceError, match=r"no login to the hub \(OtherTransportError\)"):
        resolve_shards("allenai/c4", "main", timeout_seconds=0.3)


@each("token", ["hf_\u201csecret\u201d", "folder"])
def test_a_token_that_cannot_be_read_or_sent(hub, monkeypatch, tmp_path, token):
    monkeypatch.setenv("HF_TOKEN", "" if token == "folder" else token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path))
    with pytest.raises(SourceError, match="hf auth login") as caught:
        resolve_shards("allenai/c4", "main", timeout_seconds=60.0)
    assert "secret" not in str(caught.value)


@each("revision", ["main", COMMIT])
def test_an_endpoint_that_is_not_an_address(hub, monkeypatch, revision):
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example.org")
    with pytest.raises(SourceError, match=r"HF_ENDPOINT: got 'mirror\.example\.org'"):
        resolve_shards("allenai/c4", revision)


def test_the_hub_stays_unreachable(hub):
    hub.fault = lambda n: "503"
    with pytest.raises(SourceError, match=r"hub:allenai/c4 \(revision main\): gave up after 0.3 s"):
        resolve_shards("allenai/c4", "main", timeout_seconds=0.3)
