"""Pre-tokenized text and records: the same batches bit for bit, and refusals of what does not fit or is damaged."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from relora_mora.data.columns import MappedTokens
from relora_mora.data.content import content_of
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError
from relora_mora.data.read import iter_texts, open_rows
from relora_mora.data.rows import Encoded
from relora_mora.data.sources import configured_shards
from relora_mora.data.tokens import make
from relora_mora.data.tokens.index import INDEX
from relora_mora.tokenizer.load import load_tokenizer
from tests.data.stream_tools import steps_of, stream_of
from tests.tools.data_tools import (
    data_config,
    eval_set,
    resolve_shards,
    some_texts,
    write_json_lines,
    write_parquet,
    write_shard,
    write_shards,
)
from tests.tools.each import each

LIMITS = {"max_bad_fraction": 0.9, "max_line_bytes": 150}  # shorter than some texts: every format has bad rows
RECORDS = {"kind": "prompt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_path):
    """Text and records, and next to each the same as tokens, in several record batches."""
    folder = tmp_path_factory.mktemp("texts")
    write_shards(folder / "few", 3, 45)
    write_shards(folder / "many", 11, 12, suffix=".parquet")
    bad = [b"not JSON", "", *some_texts(20, seed=50), b'{"url": "no text"}', b"", b"<html>", "the last"]
    for number in range(2):
        write_shard(folder / "bad" / f"{number}.json", bad)
        write_parquet(folder / "null" / f"{number}.parquet", [None, "", *some_texts(30, seed=number), None])
    write_shard(folder / "odd" / "empty.json", [])
    write_shard(folder / "odd" / "full.json", some_texts(30))
    rows = [{"prompt": f"{n} " + "the rank " * (n % 5), "completion": " matrix" * (n % 4)} for n in range(90)]
    for part in range(3):
        write_json_lines(folder / "records" / f"{part}.jsonl", rows[part::3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "TEXTS_PER_CALL", 7)
        for name in ("few", "many", "bad", "null", "odd", "records"):
            config = _config(folder, name)
            given = {"config": config, "tokenizer_path": tokenizer_path, "processes": 1}
            make.make_tokens(configured_shards(config, "train"), folder / f"{name}.tokens", **given)
    return folder


def _config(folder, name, **changes):
    source = folder / name if name.endswith(".tokens") else folder / name / "*"
    settings = {"records": RECORDS, "packing": "stream"} if name.startswith("records") else {"document_mask": True}
    return data_config(source, **{**LIMITS, **settings, **changes})


@pytest.mark.more
@each(
    "name,lanes,packing",
    [
        *[("few", 8, "stream"), ("many", 4, "stream"), ("bad", 16, "stream"), ("null", 2, "stream")],
        *[("odd", 1, "stream"), ("records", 4, "stream"), ("records", 4, "whole"), ("records", 4, "none")],
    ],
)
def test_tokens_give_the_batches_states_and_counts_of_the_text(folder, tokenizer_path, name, lanes, packing):
    given = {"lanes": lanes, "batch_size": 16}
    masks = {"document_mask": packing == "stream", "packing": packing}
    text = steps_of(_config(folder, name, **masks), tokenizer_path, 1, 30, **given)
    config = _config(folder, f"{name}.tokens", **masks)
    assert steps_of(config, tokenizer_path, 1, 30, **given) == text
    last = text[-1]
    assert min(state["epoch"] for state in last.state.values()) >= 1
    assert packing != "stream" or any(lane["offset"] for step in text for lane in step.state.values())
    assert name in ("many", "records") or any(lane["skipped"] for lane in last.state.values())
    for at in (1, 5, 18):
        assert steps_of(config, tokenizer_path, 1, 30 - at, text[at - 1], step=at, **given) == text[at:]


@each("lanes", [4, 16])
def test_text_and_tokens_together(folder, tokenizer_path, lanes):
    text = [str(folder / "few" / "*"), str(folder / "many" / "*")]
    mixed = [str(folder / "few.tokens"), text[1]]
    given = {"ranks": 1, "steps": 12, "lanes": lanes, "batch_size": 16}
    configs = [data_config(sources, **LIMITS) for sources in (text, mixed)]
    assert steps_of(configs[0], tokenizer_path, **given) == steps_of(configs[1], tokenizer_path, **given)


def test_a_run_reads_tokens_without_a_tokenizer(folder, monkeypatch):
    monkeypatch.setattr("relora_mora.tokenizer.load.load_tokenizer", None)
    config = _config(folder, "few.tokens")
    with stream_of(config, "none", shards=configured_shards(config, "train")) as stream:
        assert next(stream).input_ids.shape == (8, 32)


def test_a_folder_of_tokens_is_a_list_of_local_files(folder, tmp_path):
    source = shutil.copytree(folder / "few.tokens", tmp_path / "few.tokens")
    both = resolve_shards([str(source), str(folder / "many.tokens")])
    assert [shard.label for shard in both[:2]] == [f"{source}/00000.arrow", f"{source}/00001.arrow"]
    assert [shard.size for shard in both[:3]] == [(source / f"0000{n}.arrow").stat().st_size for n in range(3)]
    assert len({content_of(shards) for shards in (both, both[:3], both[3:])}) == 3
    with pytest.raises(SourceError, match="is named already"):
        resolve_shards([str(source), str(tmp_path / "." / "few.tokens")])


@each("name", ["few", "bad"])
@each("max_tokens", [None, 700])
def test_held_out_text_and_totals_are_the_same(folder, tokenizer_path, name, max_tokens):
    text, tokens = (
        eval_set(source, tokenizer_path, max_tokens=max_tokens, **LIMITS)
        for source in (folder / name / "*", folder / f"{name}.tokens")
    )
    assert np.array_equal(text.tokens, tokens.tokens)
    for value in ("utf8_bytes", "documents", "digest"):
        assert getattr(text, value) == getattr(tokens, value)
    shards = resolve_shards(str(folder / f"{name}.tokens"))
    totals = [shard.tokens.totals for shard in shards]
    if max_tokens is None:
        assert sum(each.tokens for each in totals) == text.predicted
        assert sum(each.documents for each in totals) == text.documents
    for total, shard in zip(totals, resolve_shards(str(folder / name / "*")), strict=True):
        with closing(open_rows(data_config("unused", **LIMITS), shard)) as rows:
            taken = rows.take(1000)
        assert total.rows == len(taken)
        assert total.bad == sum(isinstance(row, Skipped) and row.reason in BAD_REASONS for row in taken) > 3


def test_tokens_of_another_tokenizer_or_of_other_records_are_refused(folder, tokenizer_path, other_tokenizer):
    config = _config(folder, "bad.tokens")
    eos = load_tokenizer(tokenizer_path).eos_token_id
    of_text = configured_shards(config, "train")
    of_records = configured_shards(_config(folder, "records.tokens"), "train")
    of_others = configured_shards(_config(folder, "records.tokens", records={**RECORDS, "score": "all"}), "train")
    for shards in (of_text, of_records):
        make.check_tokens(shards, tokenizer_path=tokenizer_path, eos=eos)
    given = [(of_text, other_tokenizer, eos), (of_text, tokenizer_path, eos + 1), (of_others, tokenizer_path, eos)]
    for shards, path, end in given:
        with pytest.raises(
            SourceError, match=r"\.tokens holds tokens of another tokenizer than .*, or of records .* give"
        ):
            make.check_tokens(shards, tokenizer_path=path, eos=end)
    with pytest.raises(SourceError, match="of another tokenizer"):
        eval_set(folder / "bad.tokens", other_tokenizer, **LIMITS)
    with pytest.raises(SourceError, match=r"holds tokens, .* but text is needed here"):
        list(iter_texts(str(folder / "bad.tokens"), split="train", config=config))
    with pytest.raises(SourceError, match=r"holds tokens of records; set data\.records"):
        resolve_shards(str(folder / "records.tokens"))


def _damage(path: Path, at: int | str) -> None:
    body = bytearray(path.read_bytes())
    if at == "cut":
        path.write_bytes(body[:-100])
    elif at == "empty":
        path.write_bytes(b"")
    elif at == "gone":
        path.unlink()
    elif at == "swapped":
        shutil.copy(path.with_name("00002.arrow"), path)
    else:
        body[at] ^= 255
        path.write_bytes(body)


@each("at", [0, 9, 3000, -20, "cut", "empty", "gone", "swapped"])
def test_a_damaged_file_is_named(folder, tmp_path, tokenizer_path, at):
    shutil.copytree(folder / "few.tokens", tmp_path / "few.tokens")
    _damage(tmp_path / "few.tokens" / "00001.arrow", at)
    config = _config(tmp_path, "few.tokens")
    with pytest.raises(SourceError, match=r"00001\.arrow .*make it again"):
        content_of(configured_shards(config, "train"))
        steps_of(config, tokenizer_path, 1, 8)
    if isinstance(at, str):  # also if the content is not checked first
        with pytest.raises(SourceError, match=r"00001\.arrow "):
            steps_of(config, tokenizer_path, 1, 8)


@each(
    "change,message",
    [
        ({"files": None}, "its tokens are not finished; run .*again"),
        ({"files": []}, r"tokens\.json is damaged.*0 files of 3 shards"),
        ({"version": 2}, r"tokens\.json is damaged, or of another version \(version: "),
        ({"making": 7}, r"tokens\.json is damaged, or of another version \(making"),
        (None, r"tokens\.json is damaged, or of another version \(Invalid JSON"),
    ],
)
def test_a_damaged_index_is_named(folder, tmp_path, change, message):
    copy = shutil.copytree(folder / "few.tokens", tmp_path / "tokens")
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text("{" if change is None else json.dumps(index | change))
    with pytest.raises(SourceError, match=message):
        resolve_shards(str(copy))


def test_large_ids_and_rows_without_tokens_survive_writing_and_reading(tmp_path):
    import pyarrow

    rows = [Encoded(np.arange(n % 5, dtype=np.uint32) + (70_000 if n % 2 else 0)) for n in range(95)]
    rows[13] = rows[60] = Skipped("no_text")
    columns = {"tokens": pyarrow.list_(pyarrow.uint32()), "utf8_bytes": pyarrow.int64(), "skipped": pyarrow.string()}
    schema = pyarrow.schema(columns)
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), schema) as file:
        for first in range(0, 95, 10):
            file.write_batch(make._record_batch(rows[first : first + 10], schema))
    tokens = MappedTokens(str(tmp_path / "a.arrow"))
    assert tokens.rows == 95
    for number in (*range(95), 60, 94, 3):
        row, found = rows[number], tokens.row(number)
        assert found == row if isinstance(row, Skipped) else found.ids.tolist() == row.ids.tolist()
