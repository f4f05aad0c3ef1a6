"""Encodes rows (plain text, records, tokens) for a stream, or as whole rows with begin and end tokens."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from relora_mora.config.data import DataConfig, Packing, Score
from relora_mora.data.errors import Skipped, SourceError
from relora_mora.data.records import passages
from relora_mora.data.rows import Encode, Encoded, Row
from relora_mora.data.shard import Record, RecordFormat, Shard
from relora_mora.tokenizer.load import encode as encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def packing_of(config: DataConfig, shards: Sequence[Shard]) -> Packing:
    """How the rows of these shards are packed into sequences."""
    return config.packing_of(shard.records.settings for shard in shards)


def encoder_of(tokenizer: "PreTrainedTokenizerBase", record_format: RecordFormat) -> Encode[Any]:
    """A function that encodes rows of text, or records. Raises SourceError if such rows cannot be tokenized."""
    if not record_format.is_text:
        return record_encoder(tokenizer, record_format)
    return lambda texts: [
        Encoded(ids, utf8_bytes=len(text.encode()))
        for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True)
    ]


def ends_of(tokenizer: "PreTrainedTokenizerBase", record_format: RecordFormat) -> list[list[int]] | None:
    """The tokens before and after a whole record. None stands for EOS on both sides of a text.

    Then every token of the text is predicted, as in a stream.
    """
    if record_format.is_text:
        return None
    if record_format.settings.is_conversation:
        return [[], []]
    return [own_prefix(tokenizer), [int(tokenizer.eos_token_id)]]  # type: ignore[arg-type]


class Frame(NamedTuple):
    """What is added to a row that is packed whole, and how long it may be."""

    begin: list[int]
    end: list[int]
    most: int  # tokens: a sequence and the token after it
    drops: bool  # longer rows; otherwise they are cut

    @staticmethod
    def of(ends: list[list[int]] | None, eos: int, record_format: RecordFormat, sequence_length: int) -> "Frame":
        begin, end = ends or [[eos], [eos]]
        return Frame(begin, end, sequence_length + 1, drops=record_format.settings.too_long == "drop")

    def fit(self, row: Encoded | Skipped, source: Any = None) -> Encoded | Skipped:
        """The whole row, cut if it is too long, or the reason why it is left out; ``source`` is what was encoded.

        The end is scored if the token before it is, so the model learns to end an answer.
        """
        if isinstance(row, Skipped):
            return row
        begin, end, most, drops = self
        ids = np.array([*begin, *row.ids, *end], np.int32)
        scored = None
        if row.scored is not None:
            scored = np.zeros(len(ids), np.bool_)
            scored[len(begin) : len(ids) - len(end)] = row.scored
            scored[len(ids) - len(end) :] = scored[len(ids) - len(end) - 1]
        if len(ids) <= most:
            return Encoded(ids, scored, utf8_bytes=row.utf8_bytes)
        if drops or (scored is not None and not scored[1:most].any()):
            fault = f"has {len(ids):,} tokens, more than data.sequence_length ({most - 1:,})"
            return Skipped("over_length", source.describe(fault) if isinstance(source, Record) else f"a text {fault}")
        return Encoded(ids[:most], None if scored is None else scored[:most], cut=True)

    def fit_all(self, encode: Encode[Row], rows: list[Row]) -> list[Encoded | Skipped]:
        """Encodes rows that are packed whole."""
        return list(map(self.fit, encode(rows), rows))


def record_encoder(tokenizer: "PreTrainedTokenizerBase", record_format: RecordFormat) -> Encode[Record]:
    """Encodes records; only the tokens of their answers are scored, unless ``data.records.score`` is ``all``."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SourceError(
            f"{tokenizer.name_or_path} does not report the character offsets of its tokens, which records need; "
            "give a tokenizer with a tokenizer.json, or a sentencepiece model"
        )
    settings = record_format.settings
    template = passages.ChatTemplate.of(tokenizer, record_format) if settings.is_conversation else None

    def passage_of(record: Record) -> passages.Passage | Skipped:
        try:
            if template is None:
                return passages.passage_of(settings.kind, record.fields)
            conversation = passages.conversation_of(settings.kind, record.fields)
            return template.passage_of(conversation, scores_all=settings.score == "all")
        except passages.Unusable as fault:
            return Skipped(fault.reason, record.describe(str(fault)))

    def encode(records: list[Record]) -> list[Encoded | Skipped]:
        made = list(map(passage_of, records))
        texts = [each.text for each in made if isinstance(each, passages.Passage)]
        backend.encode_special_tokens = not settings.is_conversation
        encodings = iter(backend.encode_batch(texts, add_special_tokens=False))
        no_answer = "has no answer to learn"
        return [
            each
            if isinstance(each, Skipped)
            else _row(each, next(encodings), settings.score) or Skipped("no_answer", record.describe(no_answer))
            for record, each in zip(records, made, strict=True)
        ]

    return encode


def _row(passage: passages.Passage, encoding: Any, score: Score) -> Encoded | None:
    """The tokens of a passage; None if none is scored.

    As in transformers' ``assistant_masks``, a token is scored if it covers part of an answer. So is the last token of a
    text that ends in an answer, because some tokenizers trim spaces from a token's span until nothing is left of it.
    """
    if score == "all":
        return Encoded(encoding.ids) if encoding.ids else None
    starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    scored = np.zeros(len(starts), np.bool_)
    for begin, end in passage.answers:
        scored |= ((starts < end) | (end == len(passage.text))) & (ends > begin)
    return Encoded(encoding.ids, scored) if scored.any() else None


def how_written(tokenizer: "PreTrainedTokenizerBase", record_format: RecordFormat) -> list[Any]:
    """What decides the tokens of records besides how the tokenizer encodes plain text, as values that JSON can hold."""
    if record_format.is_text:
        return []
    if record_format.settings.is_conversation:
        return [passages.ChatTemplate.of(tokenizer, record_format).text, tokenizer.special_tokens_map]
    return [own_prefix(tokenizer)]


def records_digest(tokenizer: "PreTrainedTokenizerBase", record_format: RecordFormat) -> str | None:
    """32 hex digits over what decides the tokens of records besides the tokenizer; None for plain text."""
    if record_format.is_text:
        return None
    settings = record_format.settings.model_dump(include={"kind", "score", "columns"})
    return xxhash.xxh3_128_hexdigest(
        json.dumps([settings, *how_written(tokenizer, record_format)], sort_keys=True).encode()
    )


def own_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that the tokenizer itself puts before a text, such as BOS, so a prompt begins as at inference."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[: next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)]
