"""Pre-tokenized text gives the same batches as the text, bit for bit, and is refused if it does not fit the run."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from contextlib import closing

import numpy as np
import pyarrow
import pytest
import torch

from relora_mora.config.data import DataConfig
from relora_mora.data.content import at_versions, fingerprints, local_content, remote_content, remote_versions
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError
from relora_mora.data.formats.file_rows import iter_texts, open_rows
from relora_mora.data.lanes import merge_states
from relora_mora.data.sets.held_out import load_eval_set
from relora_mora.data.sources.resolve import resolve_shards
from relora_mora.data.stream.stream import TrainStream, describe_position
from relora_mora.data.tokens import folder as token_folder
from relora_mora.data.tokens import writer as token_writer
from relora_mora.data.tokens.checks import check_tokens, epoch_tokens
from relora_mora.data.tokens.folder import make_tokens
from relora_mora.data.tokens.index import INDEX, Index, SourceText, TokenizationSpec
from relora_mora.data.tokens.rows import Header, MappedTokens
from relora_mora.tokenizer.identity import tokenizer_fingerprint
from relora_mora.tokenizer.load import load_tokenizer
from tests.tools.data_tools import data_config, some_texts, write_parquet, write_shard, write_shards
from tests.tools.faulty_server import serving

KINDS = [".json.gz", ".parquet"]
BATCH = 16
COMMIT = "0123456789abcdef" * 2 + "01234567"
LIMITS = {
    "max_bad_fraction": 0.9,
    "max_line_bytes": 150,
}  # shorter than some texts, so that every format has bad rows


def _bad_lines(number: int) -> list:
    return [b"not JSON", "", *some_texts(20, seed=50 + number), b'{"url": "no text"}', b"", b"<html>", "the last"]


def _write_text(folder, kind):
    """More and fewer shards than lanes; good, empty and bad texts; an empty shard."""
    write_shards(folder / "few", 3, 45, suffix=kind)
    write_shards(folder / "many", 11, 12, suffix=kind)
    for number in range(2):
        if kind == ".parquet":
            write_parquet(folder / "bad" / f"{number}{kind}", [None, "", *some_texts(30, seed=number), None])
        else:
            write_shard(folder / "bad" / f"{number}{kind}", _bad_lines(number))
    write_shard(folder / "odd" / f"empty{kind}", [])
    write_shard(folder / "odd" / f"full{kind}", some_texts(30))


def _make(source, out, tokenizer_path, *, processes=1, **settings):
    config = data_config(source, **LIMITS, **settings)
    shards = resolve_shards(config.train, text_column=config.text_column)
    return make_tokens(shards, out, config=config, tokenizer_path=tokenizer_path, processes=processes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_path):
    """Text in both formats, and next to it the same text as tokens."""
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_writer, "BATCH_ROWS", 10)  # a shard is several record batches
        patch.setattr(token_writer, "TEXTS_PER_CALL", 7)
        for kind in KINDS:
            _write_text(folder / kind, kind)
            for name in ("few", "many", "bad", "odd"):
                _make(folder / kind / name / "*", folder / kind / f"{name}.tokens", tokenizer_path)
    return folder


def _run(source, tokenizer_path, *, steps, world_size=1, state=None, lanes=8, **settings):
    """For each step, the batch of all ranks and the state after it."""
    config = data_config(source, **LIMITS, document_mask=True, **settings)
    given = {"tokenizer_path": tokenizer_path, "batch_size": BATCH, "lanes": lanes, "world_size": world_size}
    streams = [TrainStream(config, rank=rank, state=state, **given) for rank in range(world_size)]
    taken = []
    try:
        for _ in range(steps):
            batches = [next(stream) for stream in streams]
            rows = [torch.cat([b.input_ids, b.labels, b.document_ids], 1).tolist() for b in batches]
            counts = [{key: count for key, count in b.counts.items() if key != "retries"} for b in batches]
            states = json.loads(json.dumps(merge_states(b.state for b in batches)))
            taken.append((sorted(itertools.chain(*rows)), counts, states))
    finally:
        for stream in streams:
            stream.close()
    return taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name,lanes", [("few", 8), ("many", 4), ("bad", 2), ("bad", 16), ("odd", 1)])
def test_batches_states_and_counts_equal_those_of_the_text(folder, tokenizer_path, kind, name, lanes):
    place = folder / kind
    text = _run(place / name / "*", tokenizer_path, steps=30, lanes=lanes)
    tokens = _run(place / f"{name}.tokens", tokenizer_path, steps=30, lanes=lanes)
    assert tokens == text
    states = [state for _, _, state in text]
    assert min(state["epoch"] for state in states[-1].values()) >= 1
    assert any(lane["offset"] for state in states for lane in state.values())
    if name in ("bad", "odd"):
        assert any(lane["skipped"] for lane in states[-1].values())
    for source in (place / name / "*", place / f"{name}.tokens"):  # a run on text continues on tokens, and the reverse
        for at in (0, 4, 17):
            rest = _run(source, tokenizer_path, steps=29 - at, lanes=lanes, state=states[at])
            assert rest == text[at + 1 :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size,workers", [(2, 0), (4, 0), (1, 2)])
def test_on_any_ranks_and_workers(folder, tokenizer_path, kind, world_size, workers):
    text = _run(folder / kind / "few" / "*", tokenizer_path, steps=8)
    tokens = _run(folder / kind / "few.tokens", tokenizer_path, steps=8, world_size=world_size, workers=workers)
    assert [(rows, state) for rows, _, state in tokens] == [(rows, state) for rows, _, state in text]


def test_text_and_tokens_together(folder, tokenizer_path):
    text = [str(folder / ".parquet" / "few" / "*"), str(folder / ".json.gz" / "many" / "*")]
    mixed = [str(folder / ".parquet" / "few.tokens"), text[1]]
    for lanes in (4, 16):
        assert _run(mixed, tokenizer_path, steps=12, lanes=lanes) == _run(text, tokenizer_path, steps=12, lanes=lanes)
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
        _make(source, tmp_path / out, tokenizer_path)
    content = local_content(resolve_shards(text))
    assert local_content(resolve_shards(tokens[:1])) == local_content(resolve_shards(text[:1]))
    assert not caplog.messages
    assert local_content(resolve_shards(tokens)) == local_content(resolve_shards([text[0], tokens[1]])) == content
    assert [message.count("LICENSE.txt") for message in caplog.messages] == [0, 1]
    assert "as tokens, and both are read; files in common: 1" in caplog.messages[0]
    assert _run(tokens, tokenizer_path, steps=6, lanes=2) == _run(text, tokenizer_path, steps=6, lanes=2)


def test_a_text_on_a_server_is_not_read_together_with_its_tokens(tmp_path, tokenizer_path):
    write_shards(tmp_path / "served", 3, 20)
    out = str(tmp_path / "out")
    with serving(tmp_path / "served") as server:
        url = f"{server.url}/part-{{00000..00002}}.json.gz"
        _make(url, tmp_path / "out", tokenizer_path)
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
def test_fingerprints_equal_those_of_the_text(folder, tokenizer_path, kind):
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
        _make(source, tmp_path / "out", tokenizer_path, text_column="content")
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
            _make(source, tmp_path / "other", tokenizer_path, text_column="content")


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


# ---- another tokenizer, limits, damage -----------------------------------------------------------------------------


def test_the_files_of_a_folder_are_not_text(folder):
    with pytest.raises(SourceError, match=r"odd\.tokens is a pre-tokenized folder, not text; give the folder itself"):
        resolve_shards(str(folder / ".json.gz" / "odd.tokens" / "*.arrow"))


def test_another_tokenizer_and_other_limits_are_refused(folder, tokenizer_path, other_tokenizer):
    source = str(folder / ".json.gz" / "bad.tokens")
    shards = resolve_shards(source)
    config = data_config(source, **LIMITS)
    eos = load_tokenizer(tokenizer_path).eos_token_id
    check_tokens(shards, tokenizer_path=tokenizer_path, eos=eos, limits=config)
    with pytest.raises(
        SourceError, match=r"bad\.tokens holds tokens of another tokenizer than .*give the tokenizer that"
    ):
        check_tokens(shards, tokenizer_path=other_tokenizer, eos=eos)
    with pytest.raises(SourceError, match="of another tokenizer"):
        check_tokens(shards, tokenizer_path=tokenizer_path, eos=eos + 1)
    with pytest.raises(SourceError, match=r"of up to 150 bytes, and data\.max_line_bytes is 99; set it to 150"):
        check_tokens(shards, tokenizer_path=tokenizer_path, eos=eos, limits=_with(config, max_line_bytes=99))
    with pytest.raises(
        SourceError, match=r"0\.json\.gz in .*: \d+ of 26 rows were bad, more than data\.max_bad_fraction"
    ):
        check_tokens(shards, tokenizer_path=tokenizer_path, eos=eos, limits=_with(config, max_bad_fraction=0.1))
    with pytest.raises(SourceError, match="of another tokenizer"):
        load_eval_set(source, config=config, tokenizer_path=other_tokenizer, sequence_length=9, max_tokens=None)
    with pytest.raises(SourceError, match="holds tokens, but text is needed here"):
        list(iter_texts(source, split="train", config=config))


def _with(config: DataConfig, **changes) -> DataConfig:
    return config.model_copy(update=changes)


@pytest.mark.parametrize("place,hint", [("hub:some/set@{}/a.json", True), ("a/{}/a.json", False)])
def test_tokens_of_an_earlier_commit_can_be_continued_by_naming_it(tmp_path, place, hint):
    making = TokenizationSpec(tokenizer="t", eos=2, max_line_bytes=100)
    earlier, now = (
        Index(
            making=making,
            texts=[
                SourceText(name=place.format(letter * 40), size=1, text_column="text", origin="hub", content=letter)
            ],
        )
        for letter in "ab"
    )
    with token_folder._locked_folder(tmp_path / "tokens", earlier):
        pass
    with (
        pytest.raises(SourceError, match="before it changed") as raised,
        token_folder._locked_folder(tmp_path / "tokens", now),
    ):
        pass
    assert (f"--data.revision={'a' * 40})" in str(raised.value)) == hint


@pytest.fixture
def copy(folder, tmp_path):
    """Tokens that a test may damage."""
    return shutil.copytree(folder / ".json.gz" / "few.tokens", tmp_path / "tokens")


def _read_all(source, tokenizer_path):
    local_content(resolve_shards(str(source)))
    _run(source, tokenizer_path, steps=8)


def _change(path, at):
    body = bytearray(path.read_bytes())
    body[at] ^= 255
    path.write_bytes(body)


def test_a_file_that_cannot_be_opened_is_not_called_damaged(copy, monkeypatch):
    def refuse(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr(pyarrow, "memory_map", refuse)
    with pytest.raises(
        SourceError, match=r"00001\.arrow .* \(Too many open files\); raise ulimit -n, or lower data\.lanes"
    ):
        MappedTokens(str(copy / "00001.arrow"))


@pytest.mark.parametrize("at", [0, 9, 3000, -20, "cut", "empty", "gone", "swapped"])
def test_a_damaged_file_is_named(copy, tokenizer_path, at):
    path = copy / "00001.arrow"
    if at == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif at == "empty":
        path.write_bytes(b"")
    elif at == "gone":
        path.unlink()
    elif at == "swapped":
        shutil.copy(copy / "00002.arrow", path)
    else:
        _change(path, at)
    with pytest.raises(SourceError, match=r"00001\.arrow .*(make it again|check the path)"):
        _read_all(copy, tokenizer_path)
    if at in ("cut", "empty", "gone", "swapped"):  # also if the content is not checked first
        with pytest.raises(SourceError, match=r"00001\.arrow "):
            _run(copy, tokenizer_path, steps=8)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"files": None}, "its tokens are not finished; run .*again"),
        ({"files": []}, r"tokens\.json is damaged \(0 files of 3 shards\)"),
        ({"version": 2}, r"tokens\.json is damaged, or of another version \(version: "),
        ({"making": 7}, r"tokens\.json is damaged, or of another version \(making"),
        (None, r"tokens\.json is damaged, or of another version \(Invalid JSON"),
    ],
)
def test_a_damaged_index_is_named(copy, change, message):
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text("{" if change is None else json.dumps(index | change))
    with pytest.raises(SourceError, match=message):
        resolve_shards(str(copy))


def test_a_folder_of_text_with_a_file_of_that_name_is_not_a_token_folder(tmp_path):
    write_shards(tmp_path, 1, 3, suffix=".json")
    (tmp_path / INDEX).write_text('{"tokens": 3}')
    assert "part-00000.json" in [shard.name for shard in resolve_shards(str(tmp_path))]


def test_rows_and_reasons_survive_writing_and_reading(tmp_path):
    """Large ids, rows without tokens, many batches, and reading rows by number."""
    rows = [np.arange(n % 5, dtype=np.uint32) + (70_000 if n % 2 else 0) for n in range(95)]
    rows[13] = rows[60] = Skipped("no_text")
    head = Header(
        TokenizationSpec(tokenizer="t", eos=2, max_line_bytes=9),
        SourceText(name="a", size=None, text_column="text", origin="hub", content=""),
        [90, 5],
    )
    with pytest.MonkeyPatch.context() as patch, (tmp_path / "a.arrow").open("wb") as stream:
        patch.setattr(token_writer, "BATCH_TOKENS", 20)
        writer = token_writer.TokenWriter(stream, head, vocabulary=80_000)
        for number, row in enumerate(rows):
            writer.write(row, number)
        writer.close()
    tokens = MappedTokens(str(tmp_path / "a.arrow"))
    assert tokens.head == head
    assert tokens.rows == 95
    for numbers in (range(95), range(3, 95, 7), range(60, 61), range(94, 95), range(5, 5)):
        found = list(tokens.take(numbers))
        assert [_plain(row) for row in found] == [_plain(rows[number]) for number in numbers]
        assert tokens.bad_among(numbers) == sum(number in (13, 60) for number in numbers)
    assert [size for _, size in tokens.documents()] == [number for number in range(95) if number not in (13, 60)]


def _plain(row):
    return row.reason if isinstance(row, Skipped) else row.tolist()
