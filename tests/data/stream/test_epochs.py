"""Every record is seen once per epoch, for any lanes, ranks and stops."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from relora_mora.data.lanes import start_states
from relora_mora.data.sets.reading import count_epochs
from relora_mora.data.stream.packing import UNSCORED, Batch
from relora_mora.data.stream.whole import of_epoch
from relora_mora.tokenizer.load import load_tokenizer
from tests.data.stream_tools import BATCH, LANES, count_of, stream_of
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


def _answers(batch: Batch, tokenizer: Any) -> list[str]:
    """The scored text of each record in a batch."""
    texts = [tokenizer.decode([int(label) for label in labels if label != UNSCORED]) for labels in batch.labels]
    return [answer for text in texts for answer in text.split("</s>") if answer]


EXPECTED = [_completion(number) for number in range(sum(SIZES)) if number != 9]


# a resume with other data, which is allowed, starts with states of lanes that have not begun
@each("packing,state", [("whole", None), ("none", None), ("whole", start_states(LANES))])
def test_every_record_is_learned_once_in_every_epoch(path, tokenizer_path, packing, state):
    config = _config(path, packing)
    tokenizer = load_tokenizer(tokenizer_path)
    epoch = count_of(config, tokenizer_path, EPOCHS)
    assert list(epoch.tokens) == [blocks * LANES * LENGTH for blocks in epoch.blocks]
    with stream_of(config, tokenizer_path, epoch_blocks=epoch.blocks, state=state) as stream:
        for number in range(EPOCHS):
            blocks = of_epoch(epoch.blocks, number)
            assert blocks % (BATCH // LANES) == 0
            batches = [next(stream) for _ in range(blocks * LANES // BATCH)]
            assert sorted(answer for batch in batches for answer in _answers(batch, tokenizer)) == sorted(EXPECTED)
            assert all((batch.labels != UNSCORED).any() for batch in batches), "no batch is empty"
            assert batches[-1].counts["epoch"] == number
            assert batches[-1].counts["documents"] == (number + 1) * len(EXPECTED)


def test_no_batch_is_empty_if_an_epoch_packs_into_fewer_blocks_than_another(tmp_path, tokenizer_path):
    draw = random.Random(0)
    rows = [{"prompt": "the" + " rank" * draw.randint(1, 7), "completion": " matrix"} for _ in range(800)]
    write_json_lines(tmp_path / "a.jsonl", rows)
    config = _config(tmp_path / "a.jsonl", "whole", shuffle_documents=1000)
    counted = count_epochs(config, tokenizer_path, lanes=BATCH, epochs=EPOCHS)
    assert min(counted.blocks) < max(counted.blocks)
    with stream_of(config, tokenizer_path, lanes=BATCH, epoch_blocks=counted.blocks) as stream:
        for number, blocks in enumerate(counted.blocks):
            batches = [next(stream) for _ in range(blocks)]
            assert all((batch.labels != UNSCORED).any() for batch in batches)
            assert batches[-1].counts["documents"] == (number + 1) * len(rows)


def test_without_a_count_each_lane_begins_its_next_epoch_immediately(path, tokenizer_path):
    config = _config(path, "none")
    tokenizer = load_tokenizer(tokenizer_path)
    seen: Counter[str] = Counter()
    with stream_of(config, tokenizer_path) as stream:
        for _ in range(EPOCHS * len(EXPECTED) // BATCH):
            batch = next(stream)
            assert (batch.labels != UNSCORED).any(dim=1).all(), "no sequence is empty"
            seen.update(_answers(batch, tokenizer))
    assert set(seen.values()) <= {EPOCHS - 1, EPOCHS, EPOCHS + 1}
    assert set(seen) == set(EXPECTED)


def test_numbers_of_used_and_skipped_records_are_logged(tokenizer_path, tmp_path, caplog):
    rows = [{"prompt": "the", "completion": _completion(number)} for number in range(20)]
    rows[3]["completion"] = ""
    rows[7]["prompt"] = "the rank " * LENGTH
    rows[8]["completion"] = " matrix" * 2 * LENGTH
    write_json_lines(tmp_path / "a.jsonl", rows)
    with caplog.at_level("INFO", "relora_mora.data.sets.reading"):
        epoch = count_of(_config(tmp_path / "a.jsonl", "whole"), tokenizer_path, EPOCHS)
    [message] = [message for message in caplog.messages if " sequences, " in message]
    found = re.fullmatch(r"18 records in (\d+) sequences, (\d+) % full(.*)", message)
    assert found is not None
    assert found[3] == "; no_answer: 1; over_length: 1; cut: 1"
    tokenizer = load_tokenizer(tokenizer_path)
    texts = [row["prompt"] + row["completion"] for at, row in enumerate(rows) if at not in (3, 7, 8)]
    tokens = LENGTH + 1 + sum(len(tokenizer(text).input_ids) + 1 for text in texts)
    assert int(found[1]) <= epoch.blocks[0] * LANES
    assert int(found[2]) == round(100 * tokens / (int(found[1]) * LENGTH))


# rows of the files, lanes, blocks of a lane in a batch, and what the warning names
@each(
    "sizes,lanes,blocks,share,setting",
    [((40, 3, 3, 3), 4, 2, "69 %", "data.lanes"), ((3,), 1, 8, "62 %", "train.batch_size")],
)
def test_many_empty_sequences_cause_a_warning(tokenizer_path, tmp_path, caplog, sizes, lanes, blocks, share, setting):
    for part, size in enumerate(sizes):
        rows = [{"prompt": "the", "completion": _completion(number)} for number in range(size)]
        write_json_lines(tmp_path / f"part-{part}.jsonl", rows)
    count_epochs(_config(tmp_path / "*.jsonl", "none"), tokenizer_path, lanes=lanes, blocks_per_lane=blocks)
    [message] = caplog.messages
    assert message.startswith(share) and message.endswith(f"; lower {setting}")


def test_a_stream_whose_lanes_have_unequal_shares_causes_a_warning(tokenizer_path, tmp_path, caplog):
    for part, size in enumerate((90, 10)):
        write_json_lines(tmp_path / f"part-{part}.jsonl", [{"text": "the rank"}] * size)
    config = data_config(tmp_path / "*.jsonl", sequence_length=LENGTH)
    count_epochs(config.model_copy(update={"concatenate": True}), tokenizer_path, lanes=LANES)
    assert not caplog.messages
    count_epochs(config, tokenizer_path, lanes=LANES)
    [message] = caplog.messages
    assert message.startswith("lanes have unequal shares of 2 files: about 40 %")
