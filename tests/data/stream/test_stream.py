"""The global batches are the same on any number of ranks and workers; also their counts and notes."""

from __future__ import annotations

import json

import pytest
import torch

from relora_mora.data.errors import BAD_REASONS, SKIP_REASONS, SourceError
from relora_mora.data.lanes import counts_of, merge_states
from relora_mora.data.stream.packing import document_ids
from tests.data.stream_tools import stream_of
from tests.tools.data_tools import data_config, line, write_shard, write_shards
from tests.tools.each import each

BATCH = 16
LANES = 8
KINDS = (".json.gz", ".txt.zst", ".csv", ".parquet", ".arrow")


def _streams(config, tokenizer_path, world_size, state=None, step=0):
    return [
        stream_of(config, tokenizer_path, rank, world_size, batch_size=BATCH, lanes=LANES, state=state, step=step)
        for rank in range(world_size)
    ]


def _take(streams, steps):
    """For each step, the set of (input_ids, labels) in the global batch, and the merged state after it."""
    steps_taken = []
    for _ in range(steps):
        batches = [next(stream) for stream in streams]
        rows = [
            row
            for b in batches
            for row in zip(map(tuple, b.input_ids.tolist()), map(tuple, b.labels.tolist()), strict=True)
        ]
        assert len(rows) == BATCH
        steps_taken.append((set(rows), json.loads(json.dumps(merge_states(b.state for b in batches)))))
    return steps_taken


def _run(config, tokenizer_path, world_size, steps, state=None, step=0):
    streams = _streams(config, tokenizer_path, world_size, state, step)
    try:
        return _take(streams, steps)
    finally:
        for stream in streams:
            stream.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for kind in KINDS:
        write_shards(folder / kind, 5, 20, suffix=kind)  # fewer shards than lanes
    return folder


def _with(config, workers):
    return config.model_copy(update={"workers": workers})


def _config(folder, kind):
    if kind != "mixture":
        return data_config(folder / kind / "*")
    sources = [
        {"source": f"{folder}/.json.gz/*", "name": "lines", "weight": 0.2},
        {"source": f"{folder}/.parquet/*", "name": "rows", "weight": 0.8},
    ]
    return data_config(sources, stages=[{"from_step": 7, "weights": {"lines": 0.01, "rows": 1}}])


@each("kind", [".txt.zst", ".csv", ".arrow", "mixture"])  # of lines and Parquet
def test_global_batches_do_not_depend_on_ranks_and_resume_on_others(folder, tokenizer_path, kind):
    config = _config(folder, kind)
    reference = _run(config, tokenizer_path, 1, 16)
    states = reference[-1][1].values()
    assert {state["epoch"] for state in states} != {0}  # beyond the first epoch
    assert _run(config, tokenizer_path, 4, 16) == reference
    first = _run(config, tokenizer_path, 2, 9)
    assert first == reference[:9]
    assert _run(config, tokenizer_path, 4, 7, first[-1][1], step=9) == reference[9:]


@pytest.mark.more
def test_global_batches_do_not_depend_on_workers_and_resume_on_others(folder, tokenizer_path):
    config = data_config([str(folder / kind / "part-00001*") for kind in KINDS])  # every format in one list
    reference = _run(config, tokenizer_path, 1, 24)
    # each run continues from the previous one, with other ranks and other workers
    first = _run(_with(config, 1), tokenizer_path, 2, 7)
    second = _run(_with(config, 2), tokenizer_path, 1, 4, first[-1][1], step=7)
    third = _run(config, tokenizer_path, 4, 13, second[-1][1], step=11)
    assert first + second + third == reference


def test_a_batch(folder, tokenizer_path):
    config = data_config(folder / ".json.gz" / "*", document_mask=True, sequence_length=16)
    with stream_of(config, tokenizer_path, 1, 2, batch_size=BATCH) as stream:
        batch = next(stream)
        after = next(stream)
        assert stream.ready(0.0)
    assert batch.input_ids.shape == batch.labels.shape == batch.document_ids.shape == (8, 16)
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.document_ids.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
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
def test_counts_and_notes_arrive(tmp_path, tokenizer_path):
    write_shard(tmp_path / "a.json", [b"rubbish", "text", line(""), "more"])
    config = data_config(tmp_path / "a.json", max_bad_fraction=0.5, sequence_length=4)
    for workers in (0, 1):
        with stream_of(_with(config, workers), tokenizer_path, batch_size=4, lanes=1) as stream:
            batch = next(stream)
            while not batch.counts["epoch"]:
                batch = next(stream)
            assert batch.counts["skipped/not_json"] == batch.counts["bad"] >= 1
            assert batch.counts["skipped/empty_text"] >= 1
            assert batch.counts["documents"] >= 2
            assert batch.counts["retries"] == 0
            assert counts_of(batch.state)["documents"] == batch.counts["documents"]
            # the same names on every rank, no matter what each has read, because sums over ranks rely on that
            skipped = [f"skipped/{kind}" for kind in SKIP_REASONS]
            assert list(batch.counts) == ["documents", "epoch", "bad", *skipped, "retries"]
            assert batch.counts["bad"] == sum(batch.counts[f"skipped/{kind}"] for kind in BAD_REASONS)


def test_numbers_that_do_not_divide_and_wrong_states_are_refused(folder, tokenizer_path):
    config = data_config(folder / ".json.gz" / "*")
    with stream_of(config, tokenizer_path) as stream:
        state = next(stream).state
    for ranks, lanes, saved, message in (
        (1, 5, None, "lanes must divide the batch"),
        (8, 4, None, "the ranks the lanes"),
        (1, 8, state, "has 4 lanes, this run has 8"),
        (1, 4, {**state, "2": {}}, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            stream_of(config, tokenizer_path, 0, ranks, lanes=lanes, state=saved)
    with pytest.raises(ValueError, match="lane 0 is in the data state of two ranks"):
        merge_states([state, state])


def test_fewer_documents_than_lanes_are_refused_with_the_remedy(tmp_path, tokenizer_path):
    path = write_shard(tmp_path / "a.json", ["the only document"])
    message = r"lane \d found no text in a\.json: there are fewer documents than lanes; .* lower data\.lanes"
    with stream_of(data_config(path), tokenizer_path) as stream, pytest.raises(SourceError, match=message):
        next(stream)
