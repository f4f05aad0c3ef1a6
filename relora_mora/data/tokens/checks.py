"""Checks before a run starts that tokens fit its tokenizer, records and limits, and counts them."""

from collections.abc import Sequence
from pathlib import Path

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.records.encoders import records_digest
from relora_mora.data.rows import too_many
from relora_mora.data.shard import Shard


def check_tokens(
    shards: Sequence[Shard], *, tokenizer_path: str, eos: int | None, limits: DataConfig | None = None
) -> None:
    """Raises SourceError if shards of tokens do not hold what this tokenizer would make of their text or records.

    With ``limits``, also if a run with these limits would make other tokens of it, or has too many bad rows in it.
    """
    folders = {str(Path(shard.location).parent): shard for shard in shards if shard.tokens is not None}
    if not folders:
        return
    from relora_mora.tokenizer.identity import tokenizer_fingerprint
    from relora_mora.tokenizer.load import load_tokenizer

    fingerprint = tokenizer_fingerprint(tokenizer_path)
    for folder, shard in folders.items():
        assert shard.tokens is not None
        spec = shard.tokens.making
        if (spec.tokenizer, spec.eos) != (fingerprint, eos):
            raise SourceError(
                f"{folder} holds tokens of another tokenizer than {tokenizer_path}; "
                "give the tokenizer that made them, or make tokens with this one in another folder"
            )
        if shard.holds_records and spec.records != records_digest(load_tokenizer(tokenizer_path), shard.records):
            raise SourceError(
                f"{folder} holds tokens of records that were written in another way; give data.records "
                "(kind, columns, template, score) as when they were made, or make tokens in another folder"
            )
        if limits is not None and spec.max_line_bytes != limits.max_line_bytes:
            raise _other_limit(folder, "max_line_bytes", spec.max_line_bytes, limits.max_line_bytes)
        if limits is not None and spec.sample_by not in (None, limits.sample_by):
            raise _other_limit(folder, "sample_by", spec.sample_by, limits.sample_by)
    for shard in shards:
        if shard.tokens is None or limits is None:
            continue
        totals = shard.tokens.totals
        if too_many(totals.bad, totals.rows, limits.max_bad_fraction):
            raise SourceError(
                f"{shard.location}: {totals.bad} of {totals.rows} rows were bad, more "
                f"than data.max_bad_fraction ({limits.max_bad_fraction:g}); repair or drop the shard, or raise it"
            )


def _other_limit(folder: str, name: str, made_with: object, now: object) -> SourceError:
    return SourceError(
        f"{folder} holds tokens that were made with data.{name} {made_with}, and it is {now} now; set it to {made_with}"
    )
