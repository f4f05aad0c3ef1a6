"""What a run asks of tokens made in advance before it starts: whether they are its own, and how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.shard import Shard


def check_tokens(
    shards: Sequence[Shard], *, tokenizer_path: str, eos: int | None, limits: DataConfig | None = None
) -> None:
    """Raises SourceError where tokens made in advance are not those that this tokenizer would make.

    Nor those that a run with these ``limits`` would make of their text.
    """
    made = {str(Path(shard.location).parent): shard.tokens for shard in shards if shard.tokens is not None}
    if not made:
        return
    from relora_mora.tokenizer.identity import tokenizer_fingerprint

    found = tokenizer_fingerprint(tokenizer_path)
    for folder, tokens in made.items():
        if (tokens.making.tokenizer, tokens.making.eos) != (found, eos):
            raise SourceError(
                f"{folder} holds tokens of another tokenizer than {tokenizer_path}; "
                "give the one that made them, or make tokens with this one in another folder"
            )
        if limits is not None and tokens.making.max_line_bytes != limits.max_line_bytes:
            raise SourceError(
                f"{folder} holds the tokens of rows of up to {tokens.making.max_line_bytes} bytes, and "
                f"data.max_line_bytes is {limits.max_line_bytes}; set it to {tokens.making.max_line_bytes}"
            )
        sample_by = tokens.making.sample_by
        if limits is not None and sample_by not in (None, limits.sample_by):
            raise SourceError(
                f"{folder} holds the tokens of text cut by {sample_by}, and data.sample_by is {limits.sample_by}; "
                f"set it to {sample_by}"
            )
    for shard in shards:
        _check_bad(shard, limits)


def epoch_tokens(shards: Sequence[Shard]) -> int | None:
    """Tokens of all lanes in one epoch, with an EOS for each document; None where some shard is text."""
    counts = [shard.tokens.totals.tokens for shard in shards if shard.tokens is not None]
    return sum(counts) if len(counts) == len(shards) else None


def _check_bad(shard: Shard, limits: DataConfig | None) -> None:
    if shard.tokens is None or limits is None:
        return
    totals = shard.tokens.totals
    if totals.bad > limits.max_bad_fraction * totals.rows:
        raise SourceError(
            f"{shard.name} in {Path(shard.location).parent}: {totals.bad} of {totals.rows} rows were bad, more than "
            f"data.max_bad_fraction ({limits.max_bad_fraction:g}); repair or drop the shard, or raise it"
        )
