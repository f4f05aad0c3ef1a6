"""Shows the first rows of training as they are tokenized."""

import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from relora_mora.config.data import DataConfig
from relora_mora.config.schema import Config
from relora_mora.data.bad_rows import RecordsFound
from relora_mora.data.errors import SourceError
from relora_mora.data.records.encoders import packing_of
from relora_mora.data.rows import Ids, Scored
from relora_mora.data.sets.check import check_columns, check_records
from relora_mora.data.sets.reading import rows_in_order, scored_mask
from relora_mora.data.shard import Shard
from relora_mora.data.sources.resolve import configured_shards
from relora_mora.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_ROWS = 1000
_GREEN = "\x1b[32m"
_PLAIN = "\x1b[0m"


def show_records(config: Config, count: int) -> None:
    """Prints the first ``count`` rows of each source of the training data, and the share of scored tokens.

    Tokens are separated by ``·``; those that are scored are green on a terminal, else in brackets. Raises SourceError
    and TokenizerError.
    """
    tokenizer = load_tokenizer(config.tokenizer_path)
    shards = configured_shards(config.data, "train")
    check_columns(shards, config.data)
    check_records(shards, config.data, tokenizer)
    for source, of_source in itertools.groupby(shards, lambda shard: shard.source):
        _show_source(source, list(of_source), config.data, tokenizer, count)


def _show_source(
    source: str, shards: Sequence[Shard], config: DataConfig, tokenizer: "PreTrainedTokenizerBase", count: int
) -> None:
    packing = packing_of(config, shards)
    end = [int(tokenizer.eos_token_id)] if packing == "stream" else []  # type: ignore[arg-type]
    scored = 0
    tokens = 0
    rows = 0
    counts = RecordsFound()
    in_order = rows_in_order(shards, config, tokenizer, packing, counts)
    for row in itertools.islice(in_order, max(count, SAMPLE_ROWS)):
        rows += 1
        mask = scored_mask(row, packing)
        scored += int(mask.sum())
        tokens += len(mask)
        if rows <= count:
            name = f" of {source}" if source else ""
            _print(f"--- row {rows}{name}: {mask.sum()} of {len(mask)} tokens scored{', cut' if row.cut else ''}")
            _print(marked(tokenizer, [*row.ids, *end], mask, colour=sys.stdout.isatty()))
    if not rows:
        raise SourceError(f"the training data {source or shards[0].label} holds no text; give a file with at least one")
    name = f"{source}: " if source else ""
    without = f"; left out: {counts}" if counts.left_out else ""
    _print(f"{name}{scored / max(1, tokens):.1%} of {tokens:,} tokens are scored (the first {rows:,} rows{without})")


def marked(tokenizer: "PreTrainedTokenizerBase", ids: Ids, scored: Scored, *, colour: bool) -> str:
    """The text of each token, with scored tokens marked; line breaks are both shown and kept."""
    begin, end = (_GREEN, _PLAIN) if colour else ("[", "]")
    parts = []
    for is_scored, run in itertools.groupby(zip(ids, scored, strict=True), lambda pair: bool(pair[1])):
        texts = "·".join(str(tokenizer.decode([int(token)])).replace("\n", "\\n\n") for token, _ in run)
        parts.append(f"{begin}{texts}{end}" if is_scored else texts)
    return "·".join(parts)


def _print(text: str) -> None:
    print(text)  # noqa: T201 - printing is the purpose of the command
