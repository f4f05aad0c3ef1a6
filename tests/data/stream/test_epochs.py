"""Every record is seen once per epoch, for any lanes, ranks and stops."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from relora_mora.data.errors import SourceError
from relora_mora.data.read import count_epochs
from relora_mora.data.stream.packing import UNSCORED, Batch
from relora_mora.data.stream.whole import WholeRows
from relora_mora.tokenizer.load import load_tokenizer
from tests.data.stream_tools import BATCH, LANES, shards_with_tokens, stream_of
from tests.tools.data_tools import data_config, write_json_lines
from tests.tools.each import each

LENGTH = 48
EPOCHS = 3
SIZES = (50, 31, 6)  # of the files: lanes have unequal shares of each


def _completion(number: int) -> str:
    return f" {number}" + " matrix" * (1 + number % 3)


@pytest.fixture(scope="module", params=["many", "one"])
def path(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    rows = [
        {"prompt": "the" + " rank" * (number % 5), "completion": _completion(number)} for number in range(sum(SIZES))
    ]
    rows[9]["completion"] = ""  # has no answer
    for part, size in enumerate(SIZES if request.param == "many" else (sum(SIZES),)):
        begin = sum(SIZES[:part])
        write_json_lines(folder / f"part-{part}.jsonl", rows[begin : begin + size])
    return folder / "*.jsonl"


def _config(path: Path, packing: str, **settings: Any) -> Any:
    records = {"kind": "prompt"}
    given = {"packing": packing, "records": records, "sequence_length": LENGTH, "max_bad_fraction": 0.1, **settings}
    return data_config(path, **given)


def _answers(batch: Batch, tokenizer: Any) -> list[list[str]]:
    """The scored text of each record in each sequence of a batch."""
    texts = [tokenizer.decode([int(label) for label in labels if label != UNSCORED]) for labels in batch.labels]
    return [[answer for answer in text.split("</s>") if answer] for text in texts]


EXPECTED = [_completion(number) for number in range(sum(SIZES)) if number != 9]


@each("packing", ["whole", "none"])
def test_every_record_is_learned_once_in_every_epoch(path, tokenizer_path, packing):
    """The sequences of a run, batch after batch and lane after lane, are those of the first epoch, then the next."""
    config = _config(path, packing)
    tokenizer = load_tokenizer(tokenizer_path)
    source = WholeRows(shards_with_tokens(config, tokenizer_path), config)
    blocks = [source.blocks_in(epoch) for epoch in range(EPOCHS)]
    orders = []
    with stream_of(config, tokenizer_path, batch_size=LANES) as stream:
        sequences = [_answers(batch, tokenizer) for batch in itertools.islice(stream, -(-sum(blocks) // LANES))]
        state = next(stream).state
    sequences = list(itertools.chain(*sequences))
    for number in blocks:
        epoch, sequences = sequences[:number], sequences[number:]
        assert all(epoch), "no sequence is empty"
        assert sorted(itertools.chain(*epoch)) == sorted(EXPECTED)
        orders.append(epoch)
    assert orders[0] != orders[1]
    assert {lane["epoch"] for lane in state.values()} == {EPOCHS}
    shards = shards_with_tokens(config, tokenizer_path)
    for epochs, expected in ((1, blocks[0]), (EPOCHS, sum(blocks)), (1.5, blocks[0] + -(-blocks[1] // 2))):
        assert count_epochs(config, "none", lanes=LANES, epochs=epochs, shards=shards) == expected * LENGTH


def test_a_source_of_whole_rows_is_read_as_often_as_it_may_be(path, tokenizer_path):
    source = {"source": str(path), "name": "answers", "records": {"kind": "prompt"}, "max_epochs": 2}
    config = _config([source], "none", records=None)
    with (
        stream_of(config, tokenizer_path) as stream,
        pytest.raises(SourceError, match=r"answers has been read 2 times"),
    ):
        for taken in itertools.count():  # noqa: B007 - counts the batches
            next(stream)
    assert taken == 2 * len(EXPECTED) // BATCH


def test_numbers_of_used_and_skipped_records_are_logged(tokenizer_path, tmp_path, caplog):
    rows = [{"prompt": "the", "completion": _completion(number)} for number in range(20)]
    rows[3]["completion"] = ""
    rows[7]["prompt"] = "the rank " * LENGTH
    rows[8]["completion"] = " matrix" * 2 * LENGTH
    write_json_lines(tmp_path / "a.jsonl", rows)
    config = _config(tmp_path / "a.jsonl", "whole")
    with caplog.at_level("INFO", "relora_mora"):
        shards = shards_with_tokens(config, tokenizer_path)
    [message] = [message for message in caplog.messages if " sequences, " in message]
    found = re.fullmatch(r"18 records in (\d+) sequences, (\d+) % full(.*)", message)
    assert found is not None
    assert found[3] == "; no_answer: 1; over_length: 1; cut: 1"
    tokenizer = load_tokenizer(tokenizer_path)
    texts = [row["prompt"] + row["completion"] for at, row in enumerate(rows) if at not in (3, 7, 8)]
    tokens = LENGTH + 1 + sum(len(tokenizer(text).input_ids) + 1 for text in texts)
    assert int(found[1]) == WholeRows(shards, config).blocks_in(0)
    assert int(found[2]) == round(100 * tokens / (int(found[1]) * LENGTH))


def test_a_stream_whose_lanes_have_unequal_shares_causes_a_warning(tokenizer_path, tmp_path, caplog):
    for part, size in enumerate((90, 10)):
        write_json_lines(tmp_path / f"part-{part}.jsonl", [{"text": "the rank"}] * size)
    config = data_config(tmp_path / "*.jsonl", sequence_length=LENGTH)
    count_epochs(config.model_copy(update={"concatenate": True}), tokenizer_path, lanes=LANES)
    assert not caplog.messages
    count_epochs(config, tokenizer_path, lanes=LANES)
    [message] = caplog.messages
    assert message.startswith("lanes have unequal shares of 2 files: about 40 %")
