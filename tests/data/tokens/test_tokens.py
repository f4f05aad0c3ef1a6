"""Pre-tokenized text gives the same batches as the text, bit for bit, and is refused if it does not fit the run."""

from __future__ import annotations

import shutil
from contextlib import closing

import numpy as np
import pytest

from relora_mora.data.content import at_versions, fingerprints, local_content, remote_content, remote_versions
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError
from relora_mora.data.formats.file_rows import open_rows
from relora_mora.data.sets.held_out import load_eval_set
from relora_mora.data.sources.resolve import resolve_shards
from relora_mora.data.stream.stream import TrainStream, describe_position
from relora_mora.data.tokens.checks import epoch_tokens
from relora_mora.data.tokens.folder import make_tokens
from relora_mora.tokenizer.identity import tokenizer_fingerprint
from tests.data.tokens.tools import BATCH, KINDS, LIMITS, batches_of, make
from tests.tools.data_tools import data_config, some_texts, write_parquet, write_shard, write_shards
from tests.tools.faulty_server import serving
from tests.tools.grids import rest

COMMIT = "0123456789abcdef" * 2 + "01234567"


JSON, PARQUET = KINDS
CASES = [(JSON, "few", 8), (JSON, "bad", 16), (JSON, "odd", 1), (PARQUET, "many", 4), (PARQUET, "bad", 2)]
CASES += rest((PARQUET, "few", 8), (PARQUET, "bad", 16), (PARQUET, "odd", 1), (JSON, "many", 4), (JSON, "bad", 2))


@pytest.mark.parametrize("kind,name,lanes", CASES)
def test_tokens_give_the_batches_states_and_counts_of_the_text(folder, tokenizer_path, kind, name, lanes):
    place = folder / kind
    text = batches_of(place / name / "*", tokenizer_path, steps=30, lanes=lanes)
    tokens = batches_of(place / f"{name}.tokens", tokenizer_path, steps=30, lanes=lanes)
    assert tokens == text
    states = [state for _, _, state in text]
    assert min(state["epoch"] for state in states[-1].values()) >= 1
    assert any(lane["offset"] for state in states for lane in state.values())
    if name in ("bad", "odd"):
        assert any(lane["skipped"] for lane in states[-1].values())
    for source in (place / name / "*", place / f"{name}.tokens"):  # a run on text continues on tokens, and the reverse
        for at in (0, 4, 17):
            rest = batches_of(source, tokenizer_path, steps=29 - at, lanes=lanes, state=states[at])
            assert rest == text[at + 1 :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size,workers", [(2, 0), (4, 0), (1, 2)])
def test_on_any_ranks_and_workers(folder, tokenizer_path, kind, world_size, workers):
    text = batches_of(folder / kind / "few" / "*", tokenizer_path, steps=8)
    tokens = batches_of(folder / kind / "few.tokens", tokenizer_path, steps=8, world_size=world_size, workers=workers)
    assert [(rows, state) for rows, _, state in tokens] == [(rows, state) for rows, _, state in text]


def test_text_and_tokens_together(folder, tokenizer_path):
    text = [str(folder / ".parquet" / "few" / "*"), str(folder / ".json.gz" / "many" / "*")]
    mixed = [str(folder / ".parquet" / "few.tokens"), text[1]]
    for lanes in (4, 16):
        assert batches_of(mixed, tokenizer_path, steps=12, lanes=lanes) == batches_of(
            text, tokenizer_path, steps=12, lanes=lanes
        )
    assert epoch_tokens(resolve_shards(mixed)) is None


@pytest.mark.parametrize(
    "sources",
    [
        ["few/*", "few.tokens"],
        ["few.tokens", "few/*"],
        ["few.tokens", "again"],
        ["few.tokens", "few/part-00001*"],
        ["many/*", "few/*", "few.tokens"],
    ],
)
def test_a_text_and_its_own_tokens_together_are_refused(folder, tmp_path, sources):
    place = folder / ".json.gz"
    shutil.copytree(place / "few.tokens", tmp_path / "again")
    given = [str((tmp_path if name == "again" else place) / name) for name in sources]
    with pytest.raises(SourceError, match=r"few.*0000.* hold the same text, .* as tokens; it would be read"):
        local_content(resolve_shards(given))
    assert local_content(resolve_shards([str(place / "odd.tokens"), str(place / "odd" / "empty*")])), "it has no text"


def test_equal_files_in_several_trees_are_read_the_same_as_tokens_and_as_text(tmp_path, tokenizer_path, caplog):
    """Two equal licenses in one tree, and a third one in another tree."""
    for place, texts in (("a", "first"), ("a/b", "second"), ("c", "third")):
        write_shard(tmp_path / place / "LICENSE.txt", ["the same"])
        write_shard(tmp_path / place / f"{texts}.txt", [texts])
    text = [str(tmp_path / name / "**") for name in ("a", "c")]
    tokens = [str(tmp_path / f"{name}.tokens") for name in ("a", "c")]
    for source, out in zip(text, tokens, strict=True):
        make(source, tmp_path / out, tokenizer_path)
    content = local_content(resolve_shards(text))
    assert local_content(resolve_shards(tokens[:1])) == local_content(resolve_shards(text[:1]))
    assert not caplog.messages
    assert local_content(resolve_shards(tokens)) == local_content(resolve_shards([text[0], tokens[1]])) == content
    assert [message.count("LICENSE.txt") for message in caplog.messages] == [0, 1]
    assert "as tokens, and both are read; files in common: 1" in caplog.messages[0]
    assert batches_of(tokens, tokenizer_path, steps=6, lanes=2) == batches_of(text, tokenizer_path, steps=6, lanes=2)


def test_a_text_on_a_server_is_not_read_together_with_its_tokens(tmp_path, tokenizer_path):
    write_shards(tmp_path / "served", 3, 20)
    out = str(tmp_path / "out")
    with serving(tmp_path / "served") as server:
        url = f"{server.url}/part-{{00000..00002}}.json.gz"
        make(url, tmp_path / "out", tokenizer_path)
        secret = f"{server.url}/part-00001.json.gz?key=secret"
        for sources in ([url, out], [out, secret]):
            shards = resolve_shards(sources)
            local_content(shards)  # does not ask the server
            shards = at_versions(shards, remote_versions(shards, 5.0))
            with pytest.raises(SourceError, match=r"part-0000.*hold the same text, .*list only one of them") as raised:
                remote_content(shards)
            assert "secret" not in str(raised.value)
            with pytest.raises(SourceError, match="hold the same text"):
                load_eval_set(
                    sources,
                    config=data_config(url),
                    tokenizer_path=tokenizer_path,
                    sequence_length=9,
                    max_tokens=None,
                )
        write_shard(tmp_path / "served" / "part-00001.json.gz", ["another text"])
        shards = resolve_shards([out, secret])
        assert remote_content(at_versions(shards, remote_versions(shards, 5.0)))


def test_a_text_on_the_hub_is_not_read_together_with_its_tokens(tmp_path, tokenizer_path, monkeypatch):
    write_shards(tmp_path / "datasets/some/set/resolve" / COMMIT, 3, 20)
    with serving(tmp_path) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        make = {"config": data_config("unused", **LIMITS), "tokenizer_path": tokenizer_path, "processes": 1}
        text = "hub:some/set/part-{00000..00001}.json.gz"
        make_tokens(resolve_shards(text, COMMIT), tmp_path / "out", **make)
        asked = len(server.requests)
        for other in (text, "hub:some/set/part-{00001..00002}.json.gz"):
            with pytest.raises(SourceError, match=rf"hub:some/set@{COMMIT}/part-0000.*hold the same text"):
                local_content(resolve_shards([str(tmp_path / "out"), other], COMMIT))
        assert len(server.requests) == asked
        assert local_content(resolve_shards([str(tmp_path / "out"), text], COMMIT[::-1])) == "", "at another commit"


def test_a_run_reads_tokens_without_a_tokenizer(folder, tokenizer_path, monkeypatch):
    monkeypatch.setattr("relora_mora.tokenizer.load.load_tokenizer", None)
    config = data_config(folder / ".json.gz" / "few.tokens")
    with TrainStream(config, tokenizer_path="none", batch_size=BATCH, lanes=8, rank=0, world_size=1) as stream:
        assert next(stream).input_ids.shape == (BATCH, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_have_the_fingerprints_of_their_text(folder, tokenizer_path, kind):
    found = tokenizer_fingerprint(tokenizer_path)
    seen = []
    for source in (folder / kind / "few" / "*", folder / kind / "few.tokens"):
        shards = resolve_shards(str(source))
        given = {"tokenizer_fingerprint": found, "batch_lanes": 8, "shards": shards}
        config = data_config(source)
        place = describe_position(
            {
                "3": {
                    "epoch": 0,
                    "place": 0,
                    "block": 0,
                    "item": 2,
                    "bad": 0,
                    "documents": 2,
                    "skipped": {},
                    "offset": 5,
                }
            },
            lanes=8,
            shards=shards,
            config=config,
        )
        seen.append((*fingerprints(config, **given), local_content(shards), place))
    assert seen[0] == seen[1]


def test_fingerprints_of_text_on_a_server_and_in_another_column(tmp_path, tokenizer_path, monkeypatch):
    write_parquet(tmp_path / "served" / "a.parquet", some_texts(9), column="content")
    with serving(tmp_path / "served") as server:
        source = f"{server.url}/a.parquet"
        make(source, tmp_path / "out", tokenizer_path, text_column="content")
        text = resolve_shards(source, text_column="content")
        tokens = resolve_shards(str(tmp_path / "out"))
        assert remote_content(at_versions(text, remote_versions(text, 5.0))) == remote_content(tokens) != ""
        assert local_content(text) == local_content(tokens) == ""
        config = data_config(source)
        given = {"tokenizer_fingerprint": "any", "batch_lanes": 1}
        assert fingerprints(config, shards=text, **given)[0] == fingerprints(config, shards=tokens, **given)[0]
        asked = len(server.requests)
        server.fault = lambda n: n > asked and write_parquet(tmp_path / "served" / "a.parquet", some_texts(8)) and None
        with pytest.raises(SourceError, match=r"a\.parquet changed while it was read"):
            make(source, tmp_path / "other", tokenizer_path, text_column="content")


def test_held_out_text_is_the_same(folder, tokenizer_path):
    place = folder / ".json.gz"
    for name in ("few", "bad"):
        for max_tokens in (None, 700):
            sets = [
                load_eval_set(
                    str(source),
                    config=data_config(source, **LIMITS),
                    tokenizer_path=tokenizer_path,
                    sequence_length=16,
                    max_tokens=max_tokens,
                )
                for source in (place / name / "*", place / f"{name}.tokens")
            ]
            assert np.array_equal(sets[0].tokens, sets[1].tokens)
            assert (sets[0].utf8_bytes, sets[0].documents) == (sets[1].utf8_bytes, sets[1].documents)
            assert sets[0].digest == sets[1].digest


def test_totals(folder, tokenizer_path):
    shards = resolve_shards(str(folder / ".json.gz" / "few.tokens"))
    held_out = load_eval_set(
        str(folder / ".json.gz" / "few" / "*"),
        config=data_config("unused", **LIMITS),
        tokenizer_path=tokenizer_path,
        sequence_length=16,
        max_tokens=None,
    )
    assert epoch_tokens(shards) == held_out.predicted
    assert sum(shard.tokens.totals.documents for shard in shards) == held_out.documents
    for shard, text in zip(shards, resolve_shards(str(folder / ".json.gz" / "few" / "*")), strict=True):
        with closing(open_rows(data_config("unused", **LIMITS), text)) as rows:
            reasons = [row.reason for row in rows.take(1000) if isinstance(row, Skipped)]
        assert shard.tokens.totals.bad == sum(reason in BAD_REASONS for reason in reasons) > 5
        assert shard.tokens.totals.rows == 45
