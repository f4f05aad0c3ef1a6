"""The global batches, states and counts are the same on any number of ranks and workers, after any stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import BAD_REASONS, SKIP_REASONS, SourceError
from relora_mora.data.lanes import counts_of
from relora_mora.data.stream.packing import document_ids
from tests.data.stream_tools import steps_of, stream_of
from tests.tools.data_tools import data_config, line, some_texts, write_json_lines, write_parquet, write_shard
from tests.tools.each import each

KINDS = (".json.gz", ".txt.zst", ".csv", ".parquet", ".arrow")


def _record(number: int) -> dict[str, Any]:
    """Some have no answer, some are longer than a sequence, some only after their answer has begun."""
    row = {"prompt": f"{number} " + "the rank " * (number % 5), "completion": " matrix" * (1 + number % 3)}
    if number % 10 == 3:
        row["completion"] = ""
    if number % 10 == 6:
        row["prompt"] += "the rank " * 30
    if number % 10 == 8:
        row["completion"] += " matrix" * 30
    return row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer shards than lanes of each kind, with bad and empty rows in some."""
    folder = tmp_path_factory.mktemp("shards")
    for kind in KINDS:
        for number in range(3):
            write_shard(folder / kind / f"part-{number:05d}{kind}", some_texts(20, seed=number))
    bad = [b"not JSON", "", *some_texts(20, seed=50), b'{"url": "no text"}', b"", b"<html>", "the last"]
    write_shard(folder / "bad" / "0.json", bad)
    write_parquet(folder / "bad" / "1.parquet", [None, "", *some_texts(30, seed=51), None])
    for part in range(3):
        write_json_lines(folder / "records" / f"{part}.jsonl", map(_record, range(part, 60, 3)))
    return folder


def _config(folder: Path, kind: str) -> DataConfig:
    settings: dict[str, Any] = {"max_bad_fraction": 0.5, "document_mask": kind == "bad", "sequence_length": 32}
    prompts = {"kind": "prompt"}
    lines = {"source": f"{folder}/.json.gz/*", "name": "lines", "weight": 0.2}
    records = {"source": f"{folder}/records/*", "name": "records", "weight": 0.3, "records": prompts}
    if kind == "mixture":
        rows = {"source": f"{folder}/.parquet/*", "name": "rows", "weight": 0.8}
        stages = [{"from_step": 7, "weights": {"lines": 0.1, "rows": 1, "records": 1}}]
        return data_config([lines, rows, records], stages=stages, **settings)
    if kind == "concatenated":
        return data_config([lines, records], concatenate=True, packing="stream", **settings)
    if kind in ("whole", "none", "stream"):
        return data_config(folder / "records" / "*", packing=kind, records=prompts, **settings)
    return data_config(folder / kind / "*", **settings)


@each("kind", [".txt.zst", ".csv", ".arrow", "bad", "mixture", "concatenated", "whole", "none", "stream"])
def test_global_batches_do_not_depend_on_ranks_and_resume_on_others(folder, tokenizer_path, kind):
    config = _config(folder, kind)
    expected = steps_of(config, tokenizer_path, 1, 22)
    assert steps_of(config, tokenizer_path, 4, 12) == expected[:12]
    first = steps_of(config, tokenizer_path, 2, 9)
    assert first == expected[:9]
    assert steps_of(config, tokenizer_path, 4, 13, first[-1], step=9) == expected[9:]
    for at in (1, 4):
        assert steps_of(config, tokenizer_path, 1, 3, expected[at - 1], step=at) == expected[at : at + 3]
    last = expected[-1]
    assert {state["epoch"] for state in last.state.values()} != {0}  # beyond the first epoch
    assert len(last.tensors) == (3 if config.masks_documents else 2)
    counted = {name.removeprefix("skipped/") for name, count in last.counts.items() if count and "skipped/" in name}
    if kind in ("whole", "none"):
        assert counted == {"no_answer", "over_length", "cut"}
    elif kind in ("stream", "concatenated"):
        assert "no_answer" in counted
    elif kind == "bad":
        assert counted == {"not_json", "empty_text", "no_text", "blank_line", "null_text"}


@pytest.mark.more
def test_global_batches_do_not_depend_on_workers_and_resume_on_others(folder, tokenizer_path):
    config = data_config([str(folder / kind / "part-00001*") for kind in KINDS])  # every format in one list
    expected = steps_of(config, tokenizer_path, 1, 24)

    def with_workers(workers: int, ranks: int, begin: int, end: int) -> None:
        given = config.model_copy(update={"workers": workers})
        before = {"after": expected[begin - 1], "step": begin} if begin else {}
        assert steps_of(given, tokenizer_path, ranks, end - begin, **before) == expected[begin:end]

    with_workers(1, ranks=2, begin=0, end=7)
    with_workers(2, ranks=1, begin=7, end=11)
    with_workers(0, ranks=4, begin=11, end=24)


def test_a_batch(folder, tokenizer_path):
    config = data_config(folder / ".json.gz" / "*", document_mask=True, sequence_length=16)
    with stream_of(config, tokenizer_path, 1, 2, batch_size=16) as stream:
        batch = next(stream)
        after = next(stream)
        assert stream.ready(0.0)
    tensors = (batch.input_ids, batch.labels, batch.document_ids)
    assert [(*each.shape, each.dtype) for each in tensors] == [
        (8, 16, dtype) for dtype in (torch.int64, torch.int64, torch.int32)
    ]
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    assert list(batch.state) == ["1", "3"]  # the lanes of this rank, in order, with four blocks of each
    for lane in (0, 1):
        blocks = [batch.input_ids[4 * lane + n] for n in range(4)] + [after.input_ids[4 * lane]]
        lasts = [batch.labels[4 * lane + n, -1] for n in range(4)]
        assert [block[0] for block in blocks[1:]] == lasts
    eos = batch.input_ids[0, 0]
    assert torch.equal(batch.document_ids.long(), torch.cumsum(batch.input_ids == eos, 1))
    assert len(json.dumps(batch.state)) < 1000


def test_an_eos_belongs_to_the_document_after_it():
    assert document_ids(torch.tensor([[5, 2, 7, 8, 2, 2, 9]]).numpy(), 2).tolist() == [[0, 1, 1, 1, 2, 3, 3]]


@pytest.mark.more
@each("workers", [0, 1])
def test_counts_and_notes_arrive(tmp_path, tokenizer_path, workers):
    write_shard(tmp_path / "a.json", [b"rubbish", "text", line(""), "more"])
    config = data_config(tmp_path / "a.json", max_bad_fraction=0.5, sequence_length=4, workers=workers)
    with stream_of(config, tokenizer_path, batch_size=4, lanes=1) as stream:
        batch = next(stream)
        assert "line 1 is not JSON" in batch.notes[0]
        while not batch.counts["epoch"]:
            batch = next(stream)
    counts = batch.counts
    assert counts["bad"] == counts["skipped/not_json"] == sum(counts[f"skipped/{kind}"] for kind in BAD_REASONS) >= 1
    assert counts["skipped/empty_text"] >= 1
    assert counts_of(batch.state)["documents"] == counts["documents"] >= 2
    assert counts["retries"] == 0
    # the same names on every rank, no matter what each has read, because sums over ranks rely on that
    assert list(counts) == ["documents", "epoch", "bad", *(f"skipped/{kind}" for kind in SKIP_REASONS), "retries"]


@each(
    "rows,settings,skipped",
    [
        ([{"text": "the only document"}], {}, "none was"),
        (
            [{"prompt": "x", "completion": ""}] * 6,
            {"packing": "stream", "records": {"kind": "prompt"}},
            r"no_answer: \d",
        ),
    ],
)
def test_a_lane_without_text_is_refused_with_the_remedy(tmp_path, tokenizer_path, rows, settings, skipped):
    config = data_config(write_json_lines(tmp_path / "a.jsonl", rows), **settings)
    message = (
        rf"lane \d found no text in a\.jsonl: there are fewer documents than lanes, .*{skipped}.*lower data\.lanes"
    )
    with stream_of(config, tokenizer_path) as stream, pytest.raises(SourceError, match=message):
        next(stream)


def test_a_position_names_the_file_of_the_last_whole_document(tmp_path, tokenizer, tokenizer_path):
    for name in "abc":
        write_shard(tmp_path / f"{name}.json", [f"{name} " * 50])
    read = [tokenizer.eos_token_id]
    before = {}
    after = {}
    with stream_of(data_config(tmp_path / "*.json"), tokenizer_path, batch_size=1, lanes=1) as stream:
        for _ in range(40):
            before, after = after, (batch := next(stream)).state
            [place] = stream.describe(before, after)
            documents = tokenizer.decode(read).split("</s>")[1:-1]
            rest = len(read) - 1 - max(at for at, token in enumerate(read) if token == tokenizer.eos_token_id)
            if documents:
                epoch = (len(documents) - 1) // 3
                file = f"{documents[-1][0]}.json"
                assert place == f"lane 0: epoch {epoch}, after {file}, block 0, row 1 and {rest} tokens"
            read += batch.labels[0].tolist()
    assert len(documents) > 6
