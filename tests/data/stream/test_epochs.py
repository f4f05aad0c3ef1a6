"""Every row is learned once per epoch, also of concatenated sources with different kinds of rows."""

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from relora_mora.config.data import DataConfig
from relora_mora.data.read import count_epochs, rows_in_order
from relora_mora.data.sources import configured_shards
from relora_mora.data.stream.packing import UNSCORED, Batch, WholeRows
from relora_mora.tokenizer.load import encode, load_tokenizer
from tests.data.stream_tools import LANES, shards_with_tokens, stream_of
from tests.tools.data_tools import data_config, write_json_lines
from tests.tools.each import each

LENGTH = 64
EPOCHS = 3


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[dict[str, Any]]:
    """Two of them are files with the same name, whose rows have different lengths."""
    folder = tmp_path_factory.mktemp("sources")
    questions = [{"q": f"rank {n}?" * (1 + n % 3), "answer": f"{n}" + " matrix" * (n % 4)} for n in range(23)]
    prompts = [{"prompt": f"the {n}", "completion": f" {n}" + " rank" * (6 - n % 5)} for n in range(31)]
    prompts[9]["completion"] = ""  # has no answer
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"yes {n}"}] for n in range(9)]
    texts = [{"text": f"text number {n} is whole"} for n in range(12)]
    asked = {"kind": "question", "columns": {"question": "q"}}
    chat = {"kind": "messages", "template": "chatml"}
    chats = [{"messages": turn} for turn in turns]

    def source(file: str, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        return {"source": str(write_json_lines(folder / file, rows)), **settings}

    return [
        source("a/rows.jsonl", questions, records=asked, name="questions"),
        source("b/rows.jsonl", prompts, records={"kind": "prompt"}, name="prompts"),
        source("chats.jsonl", chats, records=chat),
        source("texts.jsonl", texts),
    ]


def _config(sources: Any, packing: str = "none", **settings: Any) -> DataConfig:
    given = {"concatenate": True, "packing": packing, "sequence_length": LENGTH, "max_bad_fraction": 0.1, **settings}
    return data_config(sources, **given)


def _scored(batch: Batch) -> list[list[tuple[int, ...]]]:
    """The scored tokens of each row in each sequence of a batch."""
    found = []
    for labels, documents in itertools.zip_longest(batch.labels.tolist(), batch.document_ids.tolist()):
        rows = itertools.groupby(zip(documents, labels, strict=True), lambda pair: pair[0])
        scored = [tuple(label for _, label in row if label != UNSCORED) for _, row in rows]
        found.append([row for row in scored if row])
    return found


def _read_separately(sources: Any, tokenizer_path: str) -> Counter[tuple[int, ...]]:
    """The scored tokens of each row, with each source read by itself."""
    rows: Counter[tuple[int, ...]] = Counter()
    for source in sources:
        config = _config([source], concatenate=False)
        shards = configured_shards(config, "train")
        for row in rows_in_order(shards, config, load_tokenizer(tokenizer_path), "none"):
            scored = [True] * len(row.ids) if row.scored is None else row.scored
            kept = zip(row.ids[1:], scored[1:], strict=True)
            rows[tuple(int(token) for token, learned in kept if learned)] += 1
    return rows


@each("packing", ["whole", "none"])
@each("taken", [slice(4), slice(1, 2)])
def test_every_row_of_every_source_is_learned_once_in_every_epoch(sources, tokenizer_path, packing, taken):
    """The sequences of a run, batch after batch and lane after lane, are those of the first epoch, then the next."""
    config = _config(sources[taken], packing)
    expected = _read_separately(sources[taken], tokenizer_path)
    assert expected.total() == sum((23, 30, 9, 12)[taken])
    shards = shards_with_tokens(config, tokenizer_path)
    source = WholeRows(shards, config)
    blocks = [source.blocks_in(epoch) for epoch in range(EPOCHS)]
    with stream_of(config, tokenizer_path, batch_size=LANES, shards=shards) as stream:
        stream._masks_documents = True  # also if each sequence is one row
        sequences = list(itertools.chain(*(_scored(next(stream)) for _ in range(-(-sum(blocks) // LANES)))))
        state = next(stream).state
    orders = []
    for number in blocks:
        orders.append(sequences[:number])
        sequences = sequences[number:]
        assert all(orders[-1]), "no sequence is empty"
        assert Counter(itertools.chain(*orders[-1])) == expected
    assert orders[0] != orders[1]
    assert {lane["epoch"] for lane in state.values()} == {EPOCHS}
    for epochs, count in ((1, blocks[0]), (EPOCHS, sum(blocks)), (1.5, blocks[0] + -(-blocks[1] // 2))):
        assert count_epochs(config, "none", lanes=LANES, epochs=epochs, shards=shards) == count * LENGTH


def test_numbers_of_used_and_skipped_records_are_logged(tokenizer_path, tmp_path, caplog):
    rows = [{"prompt": "the", "completion": f" {number}" + " matrix" * (1 + number % 3)} for number in range(20)]
    rows[3]["completion"] = ""
    rows[7]["prompt"] = "the rank " * LENGTH
    rows[8]["completion"] = " matrix" * 2 * LENGTH
    source: Path = write_json_lines(tmp_path / "a.jsonl", rows)
    config = _config(source, "whole", concatenate=False, records={"kind": "prompt"})
    with caplog.at_level("INFO", "relora_mora"):
        shards = shards_with_tokens(config, tokenizer_path)
    [message] = [message for message in caplog.messages if " sequences, " in message]
    found = re.fullmatch(r"18 records in (\d+) sequences, (\d+) % full; no_answer: 1; over_length: 1; cut: 1", message)
    assert found and int(found[1]) == WholeRows(shards, config).blocks_in(0)
    assert 60 < int(found[2]) <= 100


def test_a_stream_whose_lanes_have_unequal_shares_causes_a_warning(tokenizer_path, tmp_path, caplog):
    for part, size in enumerate((90, 10)):
        write_json_lines(tmp_path / f"part-{part}.jsonl", [{"text": "the rank"}] * size)
    config = data_config(tmp_path / "*.jsonl", sequence_length=LENGTH)
    shared = config.model_copy(update={"concatenate": True})  # then all lanes share each file
    [ids] = encode(load_tokenizer(tokenizer_path), ["the rank"])
    assert count_epochs(shared, tokenizer_path, lanes=LANES, epochs=1.1) == 110 * (len(ids) + 1)
    assert not caplog.messages
    count_epochs(config, tokenizer_path, lanes=LANES)
    [message] = caplog.messages
    assert message.startswith("lanes have unequal shares of 2 files, so after an epoch some text is unread")
