"""Pre-tokenized text of another tokenizer, other limits or another commit, and damaged files."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from relora_mora.config.data import DataConfig
from relora_mora.data.content import content_of
from relora_mora.data.errors import Skipped, SourceError
from relora_mora.data.rows import Encoded
from relora_mora.data.sets.reading import iter_texts
from relora_mora.data.tokens import make as token_writer
from relora_mora.data.tokens.index import INDEX
from relora_mora.data.tokens.make import check_tokens
from relora_mora.data.tokens.rows import MappedTokens
from relora_mora.tokenizer.load import load_tokenizer
from tests.data.tokens.tools import LIMITS, batches_of
from tests.tools.data_tools import data_config, eval_set, resolve_shards
from tests.tools.each import each


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
    with pytest.raises(SourceError, match=r"data\.max_line_bytes 150, and it is 99 now; set it to 150"):
        check_tokens(shards, tokenizer_path=tokenizer_path, eos=eos, limits=_with(config, max_line_bytes=99))
    with pytest.raises(
        SourceError, match=r"bad\.tokens/00000\.arrow: \d+ of 26 rows were bad, more than data\.max_bad_fraction"
    ):
        check_tokens(shards, tokenizer_path=tokenizer_path, eos=eos, limits=_with(config, max_bad_fraction=0.0))
    with pytest.raises(SourceError, match="of another tokenizer"):
        eval_set(source, other_tokenizer, **LIMITS)
    with pytest.raises(SourceError, match="holds tokens, but text is needed here"):
        list(iter_texts(source, split="train", config=config))


def _with(config: DataConfig, **changes) -> DataConfig:
    return config.model_copy(update=changes)


def _copy(folder, tmp_path):
    """Tokens that a test may damage."""
    return shutil.copytree(folder / ".json.gz" / "few.tokens", tmp_path / "tokens")


def _read_all(source, tokenizer_path):
    content_of(resolve_shards(str(source)))
    batches_of(source, tokenizer_path, steps=8)


def _change(path, at):
    body = bytearray(path.read_bytes())
    body[at] ^= 255
    path.write_bytes(body)


@each("at", [0, 9, 3000, -20, "cut", "empty", "gone", "swapped"])
def test_a_damaged_file_is_named(folder, tmp_path, tokenizer_path, at):
    copy = _copy(folder, tmp_path)
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
            batches_of(copy, tokenizer_path, steps=8)


@each(
    "change,message",
    [
        ({"files": None}, "its tokens are not finished; run .*again"),
        ({"files": []}, r"tokens\.json is damaged \(0 files of 3 shards\)"),
        ({"version": 2}, r"tokens\.json is damaged, or of another version \(version: "),
        ({"making": 7}, r"tokens\.json is damaged, or of another version \(making"),
        (None, r"tokens\.json is damaged, or of another version \(Invalid JSON"),
    ],
)
def test_a_damaged_index_is_named(folder, tmp_path, change, message):
    copy = _copy(folder, tmp_path)
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text("{" if change is None else json.dumps(index | change))
    with pytest.raises(SourceError, match=message):
        resolve_shards(str(copy))


def test_rows_and_reasons_survive_writing_and_reading(tmp_path):
    """Large ids, rows without tokens, many batches, and reading rows by number."""
    rows = [np.arange(n % 5, dtype=np.uint32) + (70_000 if n % 2 else 0) for n in range(95)]
    rows[13] = rows[60] = Skipped("no_text")
    with pytest.MonkeyPatch.context() as patch, (tmp_path / "a.arrow").open("wb") as stream:
        patch.setattr(token_writer, "BATCH_TOKENS", 20)
        writer = token_writer.TokenWriter(stream, vocabulary=80_000)
        for number, row in enumerate(rows):
            writer.write(row if isinstance(row, Skipped) else Encoded(row), number)
        writer.close()
    tokens = MappedTokens(str(tmp_path / "a.arrow"))
    assert tokens.rows == 95
    for number in (*range(95), 60, 94, 3):
        row, found = rows[number], tokens.row(number)
        assert found == row if isinstance(row, Skipped) else found.ids.tolist() == row.tolist()
        assert isinstance(row, Skipped) or found.utf8_bytes == number
