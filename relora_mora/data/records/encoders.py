"""From rows to tokens: plain text, records, tokens made in advance; as parts of a stream, or whole with their ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from relora_mora.config.data import DataConfig, Packing
from relora_mora.data.errors import Skipped, SourceError
from relora_mora.data.formats.file_rows import text_encoder
from relora_mora.data.records.chat import chat_template, render, template_name
from relora_mora.data.records.passages import Conversation, Passage, conversation_of, passage_of
from relora_mora.data.rows import Encode, Encoded
from relora_mora.data.shard import Record, RecordFormat, Shard
from relora_mora.data.tokens.rows import or_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def packing_of(config: DataConfig, shards: Sequence[Shard]) -> Packing:
    """How the rows of these shards become sequences."""
    return config.packing_of(shard.records.settings if shard.records else None for shard in shards)


def encoder_of(
    tokenizer: PreTrainedTokenizerBase,
    formats: Iterable[RecordFormat | None],
    packing: Packing,
    sequence_length: int,
) -> Encode[Any]:
    """The function from rows in these formats to their tokens; at most one of them is of plain text.

    Raises SourceError where rows cannot be tokenized.
    """
    encoders = {
        _format_of_rows(record_format): _encoder(tokenizer, record_format, packing, sequence_length)
        for record_format in dict.fromkeys(formats)
    }
    if len(encoders) == 1:
        return next(iter(encoders.values()))

    def encode(rows: list[Any]) -> list[Encoded | Skipped]:
        groups = itertools.groupby(rows, lambda row: row.format if isinstance(row, Record) else None)
        return [row for record_format, group in groups for row in encoders[record_format](list(group))]

    return encode


def _format_of_rows(record_format: RecordFormat | None) -> RecordFormat | None:
    """None for rows of plain text, which do not say what they are."""
    return None if record_format is None or record_format.is_text else record_format


def _encoder(
    tokenizer: PreTrainedTokenizerBase, record_format: RecordFormat | None, packing: Packing, sequence_length: int
) -> Encode[Any]:
    eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    if record_format is None or record_format.is_text:
        text = or_tokens(text_encoder(tokenizer))
        return text if packing == "stream" else whole_texts(text, eos, record_format, sequence_length)
    encode = record_encoder(tokenizer, record_format)
    if packing == "stream":
        return encode
    settings = record_format.settings
    begin, end = ([], []) if settings.is_conversation else (own_prefix(tokenizer), [eos])
    return _whole(encode, begin, end, sequence_length, drops=settings.too_long == "drop")


def whole_texts(encode: Encode[Any], eos: int, record_format: RecordFormat | None, sequence_length: int) -> Encode[Any]:
    """Texts as whole rows: between two EOS, so that each of their tokens is predicted, as in a stream."""
    drops = record_format is not None and record_format.settings.too_long == "drop"
    return _whole(encode, [eos], [eos], sequence_length, drops=drops)


def record_encoder(tokenizer: PreTrainedTokenizerBase, record_format: RecordFormat) -> Encode[Record]:
    """The tokens of records, with those of their answers scored (``data.records.score``)."""
    from jinja2 import TemplateSyntaxError

    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise SourceError(
            f"{tokenizer.name_or_path} does not tell which characters its tokens are of, which records need; "
            "give a tokenizer with a tokenizer.json, or a sentencepiece model"
        )
    settings = record_format.settings
    scores_all = settings.score == "all"
    template = chat_template(tokenizer, record_format) if settings.is_conversation else None
    where = template_name(tokenizer, record_format)

    def passage(record: Record) -> Passage | Skipped:
        if template is None:
            return passage_of(settings.kind, record)
        conversation = conversation_of(settings.kind, record)
        if isinstance(conversation, Skipped):
            return conversation
        try:
            rendered = render(tokenizer, template, conversation, marked=not scores_all)
        except TemplateSyntaxError as error:
            raise SourceError(
                f"{where} is no Jinja: line {error.lineno}: {error.message}; correct it, or name another in "
                "data.records.template"
            ) from error
        except Exception as error:  # whatever a template raises
            said = " ".join(str(error).split())
            return Skipped("template_failed", record.describe(f"is refused by {where} ({said:.200})"))
        if not rendered.answers and any(message["role"] == "assistant" for message in conversation.messages):
            return Skipped("no_answer", record.describe(f"has an answer that {where} does not mark"))
        if any(_writes_the_same(tokenizer, template, other, rendered.text) for other in conversation.without_tools()):
            return Skipped("template_failed", record.describe(f"has tools, which {where} does not write"))
        learned = conversation.learned()
        if scores_all or all(learned):
            return rendered
        if len(rendered.answers) != len(learned):
            told = f"has a weight, and {where} marks {len(rendered.answers)} of its {len(learned)} answers"
            return Skipped("template_failed", record.describe(told))
        return rendered._replace(answers=list(itertools.compress(rendered.answers, learned)))

    def encode(records: list[Record]) -> list[Encoded | Skipped]:
        passages = [passage(record) for record in records]
        good = [each for each in passages if isinstance(each, Passage)]
        encoded = iter(_tokens(tokenizer, good, parse_special=template is not None, scores_all=scores_all))
        rows = [each if isinstance(each, Skipped) else next(encoded) for each in passages]
        return [_with_answer(row, record) for row, record in zip(rows, records, strict=True)]

    return encode


def _writes_the_same(
    tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation, written: str
) -> bool:
    try:
        return render(tokenizer, template, conversation, marked=False).text == written
    except Exception:  # a template may refuse it: then it has looked at what is left out
        return False


def how_written(tokenizer: PreTrainedTokenizerBase, record_format: RecordFormat) -> list[Any]:
    """What of a tokenizer decides the tokens of records, beside how it tokenizes text; JSON-able."""
    if record_format.settings.is_conversation:
        return [chat_template(tokenizer, record_format), tokenizer.special_tokens_map]
    return [own_prefix(tokenizer)]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage], *, parse_special: bool, scores_all: bool
) -> list[Encoded]:
    """A token is scored where it holds a character of an answer, as in transformers' ``assistant_masks``.

    So is the last one of a text that ends in an answer, of which some tokenizers trim spaces until nothing is left.
    """
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.encode_special_tokens = not parse_special
    encodings = backend.encode_batch([passage.text for passage in passages], add_special_tokens=False)
    rows = []
    for passage, encoding in zip(passages, encodings, strict=True):
        if scores_all:
            rows.append(Encoded(encoding.ids))
            continue
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        scored = np.zeros(len(starts), np.bool_)
        for begin, end in passage.answers:
            scored |= ((starts < end) | (end == len(passage.text))) & (ends > begin)
        rows.append(Encoded(encoding.ids, scored))
    return rows


def _with_answer(row: Encoded | Skipped, record: Record) -> Encoded | Skipped:
    if isinstance(row, Skipped):
        return row
    learns = len(row.ids) > 0 if row.scored is None else any(row.scored)
    return row if learns else Skipped("no_answer", record.describe("has no answer to learn"))


def own_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text by itself, such as BOS: so a prompt begins as it does at inference."""
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    return whole[: next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)]


def _whole(encode: Encode[Any], begin: list[int], end: list[int], sequence_length: int, *, drops: bool) -> Encode[Any]:
    """Rows with what stands before and behind each, none longer than a sequence and the token behind it.

    The end is scored where the token before it is: so an answer learns to end.
    """
    most = sequence_length + 1

    def fitted(row: Encoded, given: Any) -> Encoded | Skipped:
        ids = np.array([*begin, *row.ids, *end], np.int32)
        scored = None
        if row.scored is not None:
            scored = np.zeros(len(ids), np.bool_)
            scored[len(begin) : len(ids) - len(end)] = row.scored
            scored[len(ids) - len(end) :] = scored[len(ids) - len(end) - 1]
        if len(ids) <= most:
            return Encoded(ids, scored)
        if drops or (scored is not None and not scored[1:most].any()):
            told = f"has {len(ids):,} tokens, more than data.sequence_length ({sequence_length:,})"
            return Skipped("over_length", given.describe(told) if isinstance(given, Record) else f"a text {told}")
        return Encoded(ids[:most], None if scored is None else scored[:most], cut=True)

    def fitted_rows(rows: list[Any]) -> list[Encoded | Skipped]:
        encoded = zip(encode(rows), rows, strict=True)
        return [row if isinstance(row, Skipped) else fitted(row, given) for row, given in encoded]

    return fitted_rows
