"""Sources with different kinds of rows, concatenated: each row once per epoch, encoded as without the others."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from relora_mora.config.data import DataConfig
from relora_mora.data.content import fingerprints
from relora_mora.data.lanes import merge_states
from relora_mora.data.read import count_epochs, rows_in_order
from relora_mora.data.sources import configured_shards
from relora_mora.data.stream.packing import UNSCORED, Batch
from relora_mora.tokenizer.load import load_tokenizer
from tests.data.stream_tools import BATCH, LANES, stream_of
from tests.tools.data_tools import write_json_lines
from tests.tools.each import each

LENGTH = 96
EPOCHS = 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[dict[str, Any]]:
    """Two of them are files with the same name, whose rows have different lengths."""
    folder = tmp_path_factory.mktemp("sources")
    questions = [{"q": f"rank {n}?" * (1 + n % 3), "answer": f"{n}" + " matrix" * (n % 4)} for n in range(23)]
    prompts = [{"prompt": f"the {n}", "completion": f" {n}" + " rank" * (6 - n % 5)} for n in range(31)]
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
    given = {"concatenate": True, "packing": packing, "sequence_length": LENGTH, "workers": 0, **settings}
    return DataConfig(train=sources, validation="unused", **given)


def _scored(batch: Batch) -> Counter[tuple[int, ...]]:
    """The scored tokens of each sequence that has any."""
    rows = (tuple(int(label) for label in labels if label != UNSCORED) for labels in batch.labels)
    return Counter(row for row in rows if row)


def _read_separately(sources: Any, packing: str, tokenizer_path: str) -> Counter[tuple[int, ...]]:
    """The scored tokens of each row, with each source read by itself."""
    rows: Counter[tuple[int, ...]] = Counter()
    for source in sources:
        config = _config([source], packing, concatenate=False)
        shards = configured_shards(config, "train")
        for row in rows_in_order(shards, config, load_tokenizer(tokenizer_path), "none"):
            scored = [True] * len(row.ids) if row.scored is None else row.scored
            kept = zip(row.ids[1:], scored[1:], strict=True)
            rows[tuple(int(token) for token, learned in kept if learned)] += 1
    return rows


def test_every_row_of_every_source_is_learned_once_in_each_epoch(sources, tokenizer_path):
    config = _config(sources)
    expected = _read_separately(sources, "none", tokenizer_path)
    assert expected.total() == 23 + 31 + 9 + 12
    with stream_of(config, tokenizer_path, batch_size=5, lanes=5) as stream:
        for _ in range(EPOCHS):
            assert sum((_scored(next(stream)) for _ in range(expected.total() // 5)), Counter()) == expected


def test_a_stream_comes_once_in_an_epoch_except_at_its_ends(tokenizer_path, tmp_path):
    """Files of different sizes: all lanes share each of them."""
    tokenizer = load_tokenizer(tokenizer_path)
    sizes = {"large": 180, "small": 20}
    rows = {name: [{"text": f"<{name} {n:03}>"} for n in range(size)] for name, size in sizes.items()}
    given = [{"source": str(write_json_lines(tmp_path / f"{name}.jsonl", rows[name]))} for name in sizes]
    config = _config(given, "stream")
    steps = count_epochs(config, tokenizer_path, lanes=LANES) // (BATCH * LENGTH)
    with stream_of(config, tokenizer_path) as stream:
        batches = [next(stream) for _ in range(steps)]
    lanes: list[list[int]] = [[] for _ in range(LANES)]
    for batch in batches:
        for lane, rows in enumerate(batch.labels.unflatten(0, (LANES, -1))):
            lanes[lane] += rows.flatten().tolist()
    texts = [text.strip() for tokens in lanes for text in tokenizer.decode(tokens).split("</s>")]
    seen = Counter(text for text in texts if text.startswith("<") and text.endswith(">"))
    assert max(seen.values()) <= 2
    assert len(seen) >= 0.9 * sum(sizes.values())
    for name, size in sizes.items():
        assert abs(sum(count for text, count in seen.items() if name in text) - size) <= 2 * LANES


@each("packing", ["whole", "stream"])
def test_stops_and_other_numbers_of_ranks_change_nothing(sources, tokenizer_path, packing):
    config = _config(sources, packing)
    steps = 20
    with stream_of(config, tokenizer_path) as stream:
        expected = [next(stream) for _ in range(steps)]
    state = None
    step = 0
    while step < steps:
        ranks = 1 + step % 2
        parts = [stream_of(config, tokenizer_path, rank, ranks, state=state, step=step) for rank in range(ranks)]
        for _ in range(5):
            batches = [next(part) for part in parts]
            assert sum(map(_scored, batches), Counter()) == _scored(expected[step])
            step += 1
        for part in parts:
            part.close()
        state = merge_states([json.loads(json.dumps(batch.state)) for batch in batches])
        assert state == merge_states([expected[step - 1].state])


def test_a_mixture_of_the_same_sources_is_other_data(sources, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    given = {"tokenizer_fingerprint": "x", "batch_lanes": LANES, "tokenizer": tokenizer}
    configs = (_config(sources), _config(sources, concatenate=False))
    found = [fingerprints(each, shards=configured_shards(each, "train"), **given)[0] for each in configs]
    assert found[0] != found[1]
