"""What is trained on, to look at: rows as tokens with the scored part marked."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from relora_mora.config import Config, DataConfig
from relora_mora.data.checked_rows import check_columns, check_records
from relora_mora.data.encoders import packing_of
from relora_mora.data.errors import SourceError
from relora_mora.data.judged_records import RecordsFound
from relora_mora.data.packing import with_end
from relora_mora.data.rows import Encoded, Ids, Scored
from relora_mora.data.rows_in_order import rows_in_order
from relora_mora.data.sources import Shard, configured_shards

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
    from relora_mora.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer_path)
    shards = configured_shards(config.data, "train")
    check_columns(shards, config.data)
    check_records(shards, config.data, tokenizer)
    for source, some in itertools.groupby(shards, lambda shard: shard.source):
        _show_source(source, list(some), config.data, tokenizer, count)


def _show_source(
    source: str, shards: Sequence[Shard], config: DataConfig, tokenizer: PreTrainedTokenizerBase, count: int
) -> None:
    packing = packing_of(config, shards)
    in_stream = packing == "stream"
    eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    scored = 0
    tokens = 0
    rows = 0
    found = RecordsFound()
    in_order = rows_in_order(shards, config, tokenizer, packing, found)
    for row in itertools.islice(in_order, max(count, SAMPLE_ROWS)):
        rows += 1
        encoded = _with_eos(row.encoded, eos) if in_stream else row.encoded
        mask = np.ones(len(encoded.ids), np.bool_)
        if encoded.scored is not None:
            mask[:] = encoded.scored
        if not in_stream:
            mask[0] = False  # nothing stands before it
        scored += int(mask.sum())
        tokens += len(mask)
        if rows <= count:
            name = f" of {source}" if source else ""
            _print(f"--- row {rows}{name}: {mask.sum()} of {len(mask)} tokens scored{', cut' if encoded.cut else ''}")
            _print(marked(tokenizer, encoded.ids, mask, colour=sys.stdout.isatty()))
    if not rows:
        raise SourceError(f"the training data {source or shards[0].label} holds no text; give a file with at least one")
    name = f"{source}: " if source else ""
    without = "".join(f", {number:,} left out: {reason}" for reason, number in found.left_out.items())
    _print(f"{name}{scored / max(1, tokens):.1%} of {tokens:,} tokens are scored (the first {rows:,} rows{without})")


def marked(tokenizer: PreTrainedTokenizerBase, ids: Ids, scored: Scored, *, colour: bool) -> str:
    """Tokens, each as the text that it is of, with those that are scored marked; line breaks are shown and kept."""
    begin, end = (_GREEN, _PLAIN) if colour else ("[", "]")
    parts = []
    for is_scored, run in itertools.groupby(zip(ids, scored, strict=True), lambda pair: bool(pair[1])):
        texts = "·".join(str(tokenizer.decode([int(token)])).replace("\n", "\\n\n") for token, _ in run)
        parts.append(f"{begin}{texts}{end}" if is_scored else texts)
    return "·".join(parts)


def _with_eos(row: Encoded, eos: int) -> Encoded:
    return row._replace(ids=[*row.ids, eos], scored=None if row.scored is None else with_end(row.scored))


def _print(text: str) -> None:
    print(text)  # noqa: T201 - what the command is for
