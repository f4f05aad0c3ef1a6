"""The benchmark of the data pipeline."""

from __future__ import annotations

import pytest

from launch.benchmark.pipeline import pipeline_throughput
from relora_mora.data.errors import SourceError
from relora_mora.data.sources.resolve import resolve_shards
from relora_mora.data.tokens.folder import make_tokens
from tests.tools.data_tools import data_config, write_shards


def test_throughput_is_measured(tmp_path, tokenizer_path):
    write_shards(tmp_path, 5, 40)
    figures = pipeline_throughput(data_config(tmp_path / "*.gz"), tokenizer_path, tokens=2000, rounds=1)
    assert figures["data/lanes"] == figures["data/shards"] == 5
    assert figures["data/tokens_per_second_per_worker"] > 0
    assert figures["data/tokens_per_second_tokenizer"] > 0
    speeds = [figures[f"data/tokens_per_second_{what}"] for what in ("per_worker", "tokenizer")]
    assert figures["data/ratio"] == pytest.approx(speeds[0] / speeds[1])
    assert figures["data/tokens_per_second_in_advance"] > 0
    config = data_config(tmp_path / "*.gz")
    out = tmp_path / "tokens"
    make_tokens(resolve_shards(config.train), out, config=config, tokenizer_path=tokenizer_path, processes=1)
    figures = pipeline_throughput(data_config(out), "none", tokens=2000, rounds=1)
    assert figures.pop("data/tokens_per_second_in_advance") > 0
    assert figures == {"data/lanes": 5, "data/shards": 5}


def test_records_are_not_text(tmp_path, tokenizer_path):
    (tmp_path / "q.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    config = data_config(tmp_path / "q.jsonl", records={"kind": "question"})
    with pytest.raises(SourceError, match=r"q\.jsonl is read as records \(data\.records\), but text is needed here"):
        pipeline_throughput(config, tokenizer_path, tokens=2000, rounds=1)
