"""Mixtures: blocks by weight, for every lane, as a function of the step."""

import itertools
import json
from collections import Counter

import pytest

from relora_mora.data.content import order_fingerprint
from relora_mora.data.errors import SourceError
from relora_mora.data.first_rows import check_columns, check_lanes
from relora_mora.data.sources import configured_shards
from relora_mora.data.stream.producer import Mixture
from tests.data.stream_tools import stream_of
from tests.tools.data_tools import data_config, some_texts, write_parquet, write_shard, write_shards
from tests.tools.each import each
from tests.tools.faulty_server import serving


def _mixture_config(weights, **settings):
    records = [{"source": f"{name}.json", "name": name, "weight": weight} for name, weight in weights.items()]
    return data_config(records, **settings)


@each(
    "weights,lanes,blocks_per_lane",
    [
        ({"a": 0.7, "b": 0.3}, 8, 1),
        ({"a": 1, "b": 1}, 2, 1),
        ({"a": 1, "b": 1, "c": 2}, 1, 4),
        (dict.fromkeys("abcdefgh", 1), 8, 1),
        ({"a": 6, "b": 2, "c": 1, "d": 0.5, "e": 0.3, "f": 0.2}, 64, 2),
        ({"a": 0.99, "b": 0.01, "c": 0}, 8, 1),
        ({"a": 20, "b": 1}, 4, 2),  # the blocks of b come in a pattern of 21 steps
        ({"a": 15, "b": 1}, 4, 1),  # of as many steps as there are lanes
    ],
)
def test_every_source_gets_its_share_overall_and_on_every_lane(weights, lanes, blocks_per_lane):
    mixture = Mixture(_mixture_config(weights), lanes, blocks_per_lane)
    total = sum(weights.values())
    taken = Counter()
    of_lanes = [Counter() for _ in range(lanes)]
    for batch in range(500):
        for counter, sources in zip(of_lanes, mixture.sources(batch, range(lanes)), strict=True):
            assert len(sources) == blocks_per_lane
            counter.update(sources)
            taken.update(sources)
        blocks = (batch + 1) * lanes * blocks_per_lane
        for name, weight in weights.items():
            assert abs(taken[name] - blocks * weight / total) < 2
    for name, weight in weights.items():
        exact = 500 * blocks_per_lane * weight / total
        assert all(abs(counter[name] - exact) < 2 * exact**0.5 + 2 for counter in of_lanes)  # as with random draws
        assert weight or not taken[name]


def test_a_stage_begins_at_its_step_no_matter_what_was_drawn_before():
    weights = {"a": 3, "b": 1}
    stages = [{"from_step": 5, "weights": {"a": 0, "b": 1}}, {"from_step": 7, "weights": {"a": 1, "b": 1}}]
    mixture = Mixture(_mixture_config(weights, stages=stages), 4, 1)
    counts = [Counter(itertools.chain(*mixture.sources(step - 1, range(4)))) for step in range(1, 11)]
    assert counts == [{"a": 3, "b": 1}] * 4 + [{"b": 4}] * 2 + [{"a": 2, "b": 2}] * 4
    # and the sources of a lane are the same if only this lane is asked for
    assert all(mixture.sources(step, [2]) == mixture.sources(step, range(4))[2:3] for step in range(10))
    mixture = Mixture(_mixture_config(weights, stages=[{"from_step": 1, "weights": {"a": 0, "b": 1}}]), 4, 1)
    assert mixture.sources(0, range(4)) == [["b"]] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write_shards(folder / "web", 4, 30, suffix=".json")
    for number in range(2):
        texts = [f"book {number} {n} " + "word " * 20 for n in range(24)]
        write_parquet(folder / "books" / f"{number}.parquet", texts, column="content")
    return folder


def _records(folder, **of_books):
    return [
        {"source": f"{folder}/web/*", "weight": 3},
        {"source": f"{folder}/books/*", "weight": 1, "text_column": "content", **of_books},
    ]


def test_a_mixture_reads_each_source_as_if_it_were_the_only_one(folder, tokenizer_path):
    """Every lane has the same blocks of a source as without the other sources."""
    single = {}
    for name, record in zip(("web", "books"), _records(folder), strict=True):
        with stream_of(data_config([record]), tokenizer_path) as stream:
            single[name] = [[tuple(row) for row in next(stream).input_ids.tolist()] for _ in range(12)]
    config = data_config(_records(folder))
    mixture = Mixture(config, 4, 2)
    given = {
        (name, lane): iter([row for rows in single[name] for row in rows[2 * lane : 2 * lane + 2]])
        for name in single
        for lane in range(4)
    }
    with stream_of(config, tokenizer_path) as stream:
        for step in range(12):
            batch = next(stream)
            rows = [tuple(row) for row in batch.input_ids.tolist()]
            sources = itertools.chain(*mixture.sources(step, range(4)))
            for number, (row, source) in enumerate(zip(rows, sources, strict=True)):
                assert row == next(given[source, number // 2])
        assert batch.counts["blocks/web"] == 72
        assert batch.counts["blocks/books"] == 24
        assert batch.counts["epoch/web"] == batch.counts["epoch"] == 0
        positions = stream.describe({}, batch.state)
        assert len(positions) == 8
        assert positions[1].startswith("lane 0/web: epoch 0, after part-0000")
        json.dumps(batch.state)


def test_names_are_part_of_the_order_but_weights_are_not(folder):
    config = data_config(_records(folder))
    others = [data_config(_records(folder, weight=2)), data_config(_records(folder, name="novels"))]
    prints = []
    for one in (config, *others):
        given = {"tokenizer_fingerprint": "t", "batch_lanes": 4, "shards": configured_shards(one, "train")}
        prints.append(order_fingerprint(one, **given))
    order, of_weights, of_names = prints
    assert order == of_weights
    assert order != of_names


def test_a_wrong_column_is_reported_with_its_source(folder):
    config = data_config(_records(folder, text_column="contents"))
    with pytest.raises(SourceError, match=r'no column "contents"; set text_column of the source books to one of id'):
        check_columns(configured_shards(config, "train"), config)
    held_out = data_config("a.json", validation=_records(folder, text_column="contents")[1:])
    with pytest.raises(SourceError, match="set text_column of the source books to one of id"):
        check_columns(configured_shards(held_out, "validation"), held_out)


@each("served", [False, True])
@each("suffix", [".json.gz", ".txt", ".parquet"])
def test_every_lane_needs_a_text_in_each_source_that_ever_has_a_weight(folder, tmp_path, suffix, served):
    write_shard(tmp_path / f"few{suffix}", some_texts(3))
    write_shard(tmp_path / f"gap{suffix}", [*some_texts(3), "" if suffix == ".parquet" else b" "])

    def check(name, lanes, weight=1.0, plain=False, **settings):
        place = server.url if served else tmp_path
        few = {"source": f"{place}/{name}{suffix}", "weight": weight}
        config = data_config(few["source"] if plain else [*_records(folder), few], **settings)
        check_lanes(configured_shards(config, "train"), config, lanes)

    message = rf"lane 3 found no text in .*few\{suffix}: there are fewer documents than lanes, .* source few to 0"
    weights = {"web": 1.0, "books": 1.0}
    with serving(tmp_path) as server:
        check("few", 3)
        with pytest.raises(SourceError, match=message):
            check("few", 4)
        for plain in (True, False):
            with pytest.raises(SourceError, match="lane 3 found no text"):
                check("gap", 4, plain=plain)
        check("few", 4, weight=0.0, stages=[{"from_step": 9, "weights": {**weights, "few": 0.0}}])
        with pytest.raises(SourceError, match=message):
            check("few", 4, weight=0.0, stages=[{"from_step": 9, "weights": {**weights, "few": 0.1}}])
