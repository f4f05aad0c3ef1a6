"""Packing of whole rows: each record once per epoch, and the same blocks after a resume and on any number of ranks."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_mora.config.load import load_config
from relora_mora.data.errors import SourceError
from relora_mora.data.records.encoders import encoder_of
from relora_mora.data.rows import Encoded
from relora_mora.data.shard import Record
from relora_mora.data.sources.resolve import configured_shards
from relora_mora.data.stream.packing import UNSCORED
from relora_mora.data.stream.whole import WholeLane, WholeRows, block_of, first_fit
from relora_mora.data.tokens.make import tokens_of_whole_rows
from tests.data.stream_tools import shards_with_tokens, stream_of
from tests.tools.data_tools import EOS, data_config, write_json_lines

LENGTH = 48
RECORDS = 90


def _row(number: int) -> dict[str, Any]:
    """A record with its number in it; lengths differ."""
    return {"prompt": f"{number} " + "the rank " * (number % 5), "completion": " matrix" * (1 + number % 3)}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    for part in range(3):
        rows = [_row(number) for number in range(part, RECORDS, 3)]
        write_json_lines(folder / f"part-{part}.jsonl", rows)
    return folder / "*.jsonl"


def _config(path: Path, packing: str = "whole", **settings: Any) -> Any:
    records = {"kind": "prompt", **settings.pop("records", {})}
    return data_config(path, packing=packing, records=records, sequence_length=LENGTH, **settings)


def test_rows_go_into_the_first_block_with_room_from_the_largest_down():
    assert first_fit([3, 9, 4, 1, 6], 10) == [[1, 3], [2, 4], [0]]
    assert first_fit([5, 5, 5], 5) == [[0], [1], [2]]
    assert first_fit([], 5) == []


def test_a_block_by_hand():
    rows = [Encoded([7, 8, 9], [True, False, True]), Encoded([4, 5])]
    block = block_of(rows, eos=EOS, sequence_length=6)
    assert block.tokens.tolist() == [7, 8, 9, 4, 5, EOS, EOS]
    assert block.scored.tolist() == [False, True, False, True, False, False]
    assert block.documents.tolist() == [0, 0, 0, 1, 1, 2]


def test_blocks_hold_whole_records_and_waste_little(path, tokenizer, tokenizer_path):
    config = _config(path)
    [shard, *_] = configured_shards(config, "train")
    encode = encoder_of(tokenizer, [shard.records], "whole", LENGTH)
    rows = encode([Record(_row(number), "here", shard.records) for number in range(RECORDS)])
    source = WholeRows(shards_with_tokens(config, tokenizer_path), config)
    lane = WholeLane(source, 0, 1)
    blocks = [lane.next_block() for _ in range(source.blocks_in(0))]
    expected = Counter(tuple(row.ids.tolist()) for row in rows)
    found = Counter()
    for block in blocks:
        documents = [*block.documents, block.documents[-1]]  # for the last token, which is not an input
        for _, tokens in itertools.groupby(zip(documents, block.tokens.tolist(), strict=True), lambda pair: pair[0]):
            found[tuple(token for _, token in tokens)] += 1
    assert {ids: count for ids, count in found.items() if set(ids) != {tokenizer.eos_token_id}} == expected
    assert sum(len(row.ids) for row in rows) > 0.8 * len(blocks) * (LENGTH + 1)
    assert sum(int(block.scored.sum()) for block in blocks) == sum(int(row.scored.sum()) for row in rows)


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [part for part in (batch.input_ids, batch.labels, batch.document_ids) if part is not None]


def test_sources_of_text_and_of_records_are_mixed(path, tokenizer, tokenizer_path, tmp_path):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "over the rank " * 9}) for _ in range(20)))
    train = [
        {"source": str(path), "name": "records", "records": {"kind": "prompt"}},
        {"source": str(tmp_path / "text.jsonl"), "name": "text"},
    ]
    config = data_config("x", train=train, sequence_length=LENGTH)
    assert config.masks_documents
    with stream_of(config, tokenizer_path) as stream:
        batch = next(stream)
    kinds = Counter()
    for inputs, labels, documents in zip(*_tensors(batch), strict=True):
        is_text = bool((labels != UNSCORED).all())
        kinds[is_text] += 1
        assert is_text == (len(documents.unique()) == 1)
        assert not is_text or "over the rank over" in tokenizer.decode(inputs.tolist())
    assert kinds == {True: 4, False: 4}


def test_tokens_in_the_cache_are_made_once_and_removed_if_the_records_change(tmp_path, tokenizer_path, monkeypatch):
    source = write_json_lines(tmp_path / "a.jsonl", map(_row, range(20)))
    config = _config(source)

    def made(config: Any = config) -> list[str]:
        shards = configured_shards(config, "train")
        return [
            shard.location for shard in tokens_of_whole_rows(shards, config, tokenizer_path, tmp_path / "c").values()
        ]

    [first] = made()
    with monkeypatch.context() as patch:
        patch.setattr("relora_mora.data.tokens.make.write_tokens", lambda *_, **__: pytest.fail("it was made again"))
        assert made() == [first]
    write_json_lines(source, map(_row, reversed(range(20))))
    [second] = made()
    [swapped] = made(_config(source, records={"columns": {"prompt": "completion", "completion": "prompt"}}))
    assert len({first, second, swapped}) == 3
    assert len(list((tmp_path / "c").iterdir())) == 1
    streams = config.model_copy(update={"packing": "stream"})
    shards = configured_shards(streams, "train")
    assert tokens_of_whole_rows(shards, streams, tokenizer_path, tmp_path / "c") == {}
    assert list((tmp_path / "c").iterdir()) == []


def test_records_that_cannot_be_used_end_the_run_before_its_first_batch(tmp_path, tokenizer_path):
    bad = [*map(_row, range(200)), *[{"prompt": "x", "completion": ""}] * 30]
    config = _config(write_json_lines(tmp_path / "bad.jsonl", bad))
    with pytest.raises(SourceError, match=r"\d+ of \d+ records cannot be used, .* has no answer to learn"):
        stream_of(config, tokenizer_path)
    long = [{"prompt": "the rank " * 40, "completion": "x"}] * 3
    config = _config(write_json_lines(tmp_path / "long.jsonl", long))
    with pytest.raises(SourceError, match=r"no row that can be used \(over_length: 3\).*data\.sequence_length"):
        stream_of(config, tokenizer_path)


def test_a_template_is_found_next_to_the_settings(tmp_path):
    (tmp_path / "own.jinja").write_text("x")
    records = {"kind": "messages", "template": "own.jinja"}
    tree = {
        "model": {"config": "c"},
        "tokenizer": {"path": "t"},
        "train": {"run_dir": "r"},
        "data": {"train": "a", "validation": [{"source": "b", "records": records}], "records": records},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    data = load_config(tmp_path / "run.yaml").data
    found = [held.template for held in (data.records, data.sources("validation")[0].records) if held]
    assert found == [str(tmp_path / "own.jinja")] * 2
