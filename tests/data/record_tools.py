"""Tools that show records as tokens and which of these are scored."""

from typing import Any

from relora_mora.config.data import RecordsConfig
from relora_mora.data.records.encoders import Frame, encoder_of, ends_of
from relora_mora.data.rows import Encoded
from relora_mora.data.shard import Record, RecordFormat

CONVERSATION = [
    {"role": "system", "content": "over the rank"},
    {"role": "user", "content": "the rank of größer?"},
    {"role": "assistant", "content": "matrix </s> one"},
    {"role": "user", "content": "  more"},
    {"role": "assistant", "content": "the same"},
]


def encoded(tokenizer, fields: dict[str, Any], packing: str = "whole", length: int = 1000, **settings: Any) -> Any:
    held = RecordFormat.of(RecordsConfig(**settings))
    [row] = encoder_of(tokenizer, held)([Record(fields, "a.jsonl, line 1")])
    return row if packing == "stream" else whole(tokenizer, held, row, length)


def whole(tokenizer, held: RecordFormat, row: Any, length: int = 1000) -> Any:
    """A row as it is packed whole."""
    return Frame.of(ends_of(tokenizer, held), tokenizer.eos_token_id, held, length).fit(row)


def parts(tokenizer, row: Encoded) -> list[tuple[bool, str]]:
    """Runs of tokens that are scored or not, as text."""
    runs: list[tuple[bool, list[int]]] = []
    for token, scored in zip(row.ids, row.scored, strict=True):
        if not runs or runs[-1][0] != bool(scored):
            runs.append((bool(scored), []))
        runs[-1][1].append(int(token))
    return [(scored, tokenizer.decode(ids)) for scored, ids in runs]
