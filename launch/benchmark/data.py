"""Tokens per second of a pipeline worker, of the bare tokenizer, and of pre-tokenized data, as one JSON line."""

from __future__ import annotations

import json

from relora_mora.cli.arguments import PositiveInt

MAX_LANES = 65_536  # a limit, because each lane gets its own plan of the shards


def main(
    config: str, *, lanes: int | None = None, tokens: PositiveInt = 1_000_000, rounds: PositiveInt = 3, **overrides: str
) -> None:
    """Measures the pipeline of a run's training data, which must be plain text or tokens.

    Args:
        config: a YAML file such as configs/run/tiny_remora.yaml
        lanes: streams that share the shards; default: as many as shards, at most 64
        tokens: tokens to produce in each round
        rounds: rounds of pipeline and tokenizer in turns; the fastest of each counts
        overrides: settings as --section.key=value
    """
    from launch.benchmark.pipeline import pipeline_throughput
    from relora_mora.config.load import load_config

    if lanes is not None and not 1 <= lanes <= MAX_LANES:
        raise ValueError(f"--lanes: got {lanes}, expected 1 to {MAX_LANES:,}")
    settings = load_config(config, overrides)
    rates = pipeline_throughput(settings.data, settings.tokenizer_path, lanes=lanes, tokens=tokens, rounds=rounds)
    print(json.dumps(rates))
