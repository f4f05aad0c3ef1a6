"""Checks before a run starts that pre-tokenized text fits its tokenizer and limits, and counts its tokens."""

from collections.abc import Sequence
from pathlib import Path

from relora_mora.config.data import DataConfig
from relora_mora.data.bad_rows import too_many
from relora_mora.data.errors import SourceError
from relora_mora.data.shard import Shard


def check_tokens(
    shards: Sequence[Shard], *, tokenizer_path: str, eos: int | None, limits: DataConfig | None = None
) -> None:
    """Raises SourceError if pre-tokenized shards do not hold the tokens that this tokenizer would make of their text.

    With ``limits``, also if a run with these limits would make other tokens of it, or has too many bad rows in it.
    """
    folders = {str(Path(shard.location).parent): shard.tokens for shard in shards if shard.tokens is not None}
    if not folders:
        return
    from relora_mora.tokenizer.identity import tokenizer_fingerprint

    fingerprint = tokenizer_fingerprint(tokenizer_path)
    for folder, tokens in folders.items():
        spec = tokens.making
        if (spec.tokenizer, spec.eos) != (fingerprint, eos):
            raise SourceError(
                f"{folder} holds tokens of another tokenizer than {tokenizer_path}; "
                "give the tokenizer that made them, or make tokens with this one in another folder"
            )
        if limits is not None and spec.max_line_bytes != limits.max_line_bytes:
            raise SourceError(
                f"{folder} holds the tokens of rows of up to {spec.max_line_bytes} bytes, and "
                f"data.max_line_bytes is {limits.max_line_bytes}; set it to {spec.max_line_bytes}"
            )
        if limits is not None and spec.sample_by not in (None, limits.sample_by):
            raise SourceError(
                f"{folder} holds the tokens of text cut by {spec.sample_by}, and data.sample_by is {limits.sample_by}; "
                f"set it to {spec.sample_by}"
            )
    for shard in shards:
        if shard.tokens is None or limits is None:
            continue
        totals = shard.tokens.totals
        if too_many(totals.bad, totals.rows, limits.max_bad_fraction):
            raise SourceError(
                f"{shard.location}: {totals.bad} of {totals.rows} rows were bad, more "
                f"than data.max_bad_fraction ({limits.max_bad_fraction:g}); repair or drop the shard, or raise it"
            )


def epoch_tokens(shards: Sequence[Shard]) -> int | None:
    """Tokens of all lanes in one epoch, with an EOS for each document; None if any shard is text."""
    counts = [shard.tokens.totals.tokens for shard in shards if shard.tokens is not None]
    return sum(counts) if len(counts) == len(shards) else None
