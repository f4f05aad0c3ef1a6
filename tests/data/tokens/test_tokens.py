"""Pre-tokenized text gives the same batches as the text, bit for bit, and is refused if it does not fit the run."""

from __future__ import annotations

import shutil
from contextlib import closing

import numpy as np
import pytest

from relora_mora.data.content import content_of
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError
from relora_mora.data.read import open_rows
from relora_mora.data.stream.stream import TrainStream
from tests.data.tokens.tools import BATCH, KINDS, LIMITS, batches_of
from tests.tools.data_tools import data_config, eval_set, resolve_shards
from tests.tools.each import each

JSON, PARQUET = KINDS
CASES = [(JSON, "few", 8), (JSON, "bad", 16), (JSON, "odd", 1), (PARQUET, "many", 4), (PARQUET, "bad", 2)]


@pytest.mark.more
@each("kind,name,lanes", CASES)
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
    for at in (0, 4, 17):
        rest = batches_of(place / f"{name}.tokens", tokenizer_path, steps=29 - at, lanes=lanes, state=states[at])
        assert rest == text[at + 1 :]


def test_text_and_tokens_together(folder, tokenizer_path):
    text = [str(folder / ".parquet" / "few" / "*"), str(folder / ".json.gz" / "many" / "*")]
    mixed = [str(folder / ".parquet" / "few.tokens"), text[1]]
    for lanes in (4, 16):
        assert batches_of(mixed, tokenizer_path, steps=12, lanes=lanes) == batches_of(
            text, tokenizer_path, steps=12, lanes=lanes
        )


def test_a_run_reads_tokens_without_a_tokenizer(folder, tokenizer_path, monkeypatch):
    monkeypatch.setattr("relora_mora.tokenizer.load.load_tokenizer", None)
    config = data_config(folder / ".json.gz" / "few.tokens")
    with TrainStream(config, tokenizer_path="none", batch_size=BATCH, lanes=8, rank=0, world_size=1) as stream:
        assert next(stream).input_ids.shape == (BATCH, 32)


def test_a_folder_of_tokens_is_a_list_of_local_files(folder, tmp_path):
    source = shutil.copytree(folder / ".json.gz" / "few.tokens", tmp_path / "few.tokens")
    both = resolve_shards([str(source), str(folder / ".json.gz" / "many.tokens")])
    assert [shard.label for shard in both[:2]] == [f"{source}/00000.arrow", f"{source}/00001.arrow"]
    assert [shard.size for shard in both[:3]] == [
        (source / f"0000{number}.arrow").stat().st_size for number in range(3)
    ]
    assert len({content_of(shards) for shards in (both, both[:3], both[3:])}) == 3
    with pytest.raises(SourceError, match="names already"):
        resolve_shards([str(source), str(tmp_path / "." / "few.tokens")])


def test_held_out_text_is_the_same(folder, tokenizer_path):
    place = folder / ".json.gz"
    for name in ("few", "bad"):
        for max_tokens in (None, 700):
            sources = (place / name / "*", place / f"{name}.tokens")
            sets = [eval_set(source, tokenizer_path, max_tokens=max_tokens, **LIMITS) for source in sources]
            assert np.array_equal(sets[0].tokens, sets[1].tokens)
            assert (sets[0].utf8_bytes, sets[0].documents) == (sets[1].utf8_bytes, sets[1].documents)
            assert sets[0].digest == sets[1].digest


def test_totals(folder, tokenizer_path):
    shards = resolve_shards(str(folder / ".json.gz" / "few.tokens"))
    held_out = eval_set(folder / ".json.gz" / "few" / "*", tokenizer_path, **LIMITS)
    assert sum(shard.tokens.totals.tokens for shard in shards) == held_out.predicted
    assert sum(shard.tokens.totals.documents for shard in shards) == held_out.documents
    for shard, text in zip(shards, resolve_shards(str(folder / ".json.gz" / "few" / "*")), strict=True):
        with closing(open_rows(data_config("unused", **LIMITS), text)) as rows:
            reasons = [row.reason for row in rows.take(1000) if isinstance(row, Skipped)]
        assert shard.tokens.totals.bad == sum(reason in BAD_REASONS for reason in reasons) > 5
        assert shard.tokens.totals.rows == 45
