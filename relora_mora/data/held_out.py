"""Held-out sets of text or records, which score the same tokens on any number of ranks, and the answers to generate."""

import functools
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from relora_mora.config.data import DataConfig, TextSource, as_sources
from relora_mora.data.content import content_of
from relora_mora.data.errors import SourceError
from relora_mora.data.read import rows_in_order
from relora_mora.data.records.encoders import packing_of
from relora_mora.data.rows import Encoded, RecordsFound
from relora_mora.data.sources import shards_of
from relora_mora.data.stream.packing import (
    UNSCORED,
    DocumentIds,
    Mask,
    Tokens,
    block_of,
    document_ids,
    packed,
    scored_mask,
)
from relora_mora.data.tokens.make import check_tokens
from relora_mora.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    import torch

    EvalBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """Token ids, int32: the prompt before an answer, and the answer with the end token that the model should learn."""

    prompt: Tokens
    answer: Tokens


def answer_of(row: Encoded) -> Answer | None:
    """The last answer of a record; None if no answer follows a prompt, or the record was cut."""
    if row.scored is None or row.cut:
        return None
    scored = np.asarray(row.scored, np.bool_)
    ids = np.asarray(row.ids, np.int32)
    end = int(np.flatnonzero(scored)[-1]) + 1
    before = np.flatnonzero(~scored[:end])
    if not len(before):
        return None
    begin = int(before[-1]) + 1
    return Answer(ids[:begin], ids[begin:end])


@dataclass(frozen=True)
class EvalSet:
    """Whole documents, packed as in training. Plain text is EOS, document, EOS, document, EOS.

    ``utf8_bytes`` is the size of the text if all of it is scored, and otherwise None. Bits per byte are the summed nats
    over ``predicted`` tokens / ln 2 / ``utf8_bytes``: EOS is predicted but has no bytes.
    """

    tokens: Tokens  # int32 [blocks, T + 1]
    scored: Mask  # [blocks, T]: whether the token after each input counts
    document_ids: DocumentIds | None  # [blocks, T]; None unless attention stays within a document
    utf8_bytes: int | None
    digest: str  # 16 hex digits over the tokens of all rows and their scored masks
    documents: int
    eos: int
    answers: Sequence[Answer] = ()  # to generate

    @functools.cached_property
    def predicted(self) -> int:
        """The number of scored tokens."""
        return int(self.scored.sum())

    @property
    def blocks(self) -> int:
        return len(self.tokens)

    def batches(
        self, rank: int, world_size: int, micro_batch_size: int, *, shrinks: bool = True
    ) -> "Iterator[EvalBatch]":
        """(input_ids, labels, document_ids), each [micro_batch_size, sequence_length].

        Labels are already shifted, and ``UNSCORED`` for tokens that are not scored; document_ids are as in training.
        Every rank gets the same number of batches, because collectives need that; the last batches are padded with
        unscored sequences. Over all ranks, each token is scored once, including those of the short last block. Batches
        are no larger than needed if ``shrinks``; compiled layers need batches of one size instead.
        """
        length = self.scored.shape[1]
        if shrinks:
            micro_batch_size = min(micro_batch_size, -(-self.blocks // world_size))
        per_round = micro_batch_size * world_size
        for first in range(rank * micro_batch_size, -(-self.blocks // per_round) * per_round, per_round):
            rows = slice(first, first + micro_batch_size)  # fewer, or none, at the end
            labels = np.where(self.scored[rows], self.tokens[rows, 1:], UNSCORED)
            documents = None
            if self.document_ids is not None:
                begins_each = np.arange(1, length + 1, dtype=np.int32)  # an EOS begins a document
                documents = _padded(self.document_ids[rows], micro_batch_size, begins_each)
            yield (
                _padded(self.tokens[rows, :-1].astype(np.int64), micro_batch_size, self.eos),
                _padded(labels.astype(np.int64), micro_batch_size, UNSCORED),
                documents,
            )


def _padded(rows: npt.NDArray[Any], count: int, value: Any) -> "torch.Tensor":
    """[count, T]: the rows, then rows of ``value``."""
    import torch

    padding = np.broadcast_to(np.asarray(value, rows.dtype), (count - len(rows), rows.shape[1]))
    return torch.from_numpy(np.concatenate([rows, padding]))


def load_eval_set(
    sources: str | Sequence[str | TextSource],
    *,
    config: DataConfig,
    tokenizer_path: str,
    sequence_length: int,
    max_tokens: int | None,
    answers: int = 0,
) -> EvalSet:
    """The first documents of the sources' validation split that together score at most ``max_tokens``; None: all.

    Of ``config``, the revision, the limits on lines, the records and their packing matter. The first document is taken
    even if it is longer. The first ``answers`` answers in these documents are kept for generation. Raises SourceError
    if there is no document.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    config = config.model_copy(update={"sequence_length": sequence_length})
    shards = shards_of(sources, config, "validation")
    check_tokens(shards, tokenizer_path=tokenizer_path, eos=eos)
    content_of(shards)  # raises for tokens that have changed
    packing = packing_of(config, shards)
    counts = RecordsFound(config)
    names = ", ".join(source.source for source in as_sources(sources))
    rows: list[Encoded] = []
    left = most = math.inf if max_tokens is None else max_tokens
    for row in rows_in_order(shards, config, tokenizer, packing, counts):
        size = int(scored_mask(row, packing).sum())
        if size > left and rows:
            if left > most / 2:
                log.warning(
                    "%s: only %s of at most %s tokens are scored, because the next document has %s; split the text "
                    "(data.sample_by), or raise the limit (eval.max_tokens, --max_tokens)",
                    names,
                    *(f"{count:,}" for count in (most - left, most, size)),
                )
            break
        left -= size
        rows.append(row)
    if not rows:
        raise SourceError(f"the validation data {names} holds no text; give a source with at least one document")
    if counts.left_out:
        log.info("%s: %s rows are scored; left out: %s", names, f"{len(rows):,}", counts)
    blocks = _stream(rows, config, eos) if packing == "stream" else _whole(rows, config, eos, packing == "whole")
    sizes = [row.utf8_bytes for row in rows if row.utf8_bytes is not None]
    return EvalSet(
        *blocks,
        utf8_bytes=sum(sizes) if len(sizes) == len(rows) else None,
        digest=_digest(rows),
        documents=len(rows),
        eos=eos,
        answers=list(itertools.islice(filter(None, map(answer_of, rows)), answers)),
    )


def _digest(rows: Iterable[Encoded]) -> str:
    digest = xxhash.xxh3_64()
    for row in rows:
        digest.update(len(row.ids).to_bytes(8, "little"))
        digest.update(np.asarray(row.ids, np.int32).tobytes())
        if row.scored is not None:
            digest.update(np.packbits(row.scored).tobytes())
    return digest.hexdigest()


def _stream(rows: Sequence[Encoded], config: DataConfig, eos: int) -> tuple[Tokens, Mask, DocumentIds | None]:
    """The blocks that the first lane of a stream would have; the last block is padded with unscored EOS."""
    length = config.sequence_length
    row_tokens = np.concatenate([np.array([*row.ids, eos], np.int32) for row in rows])
    blocks = -(-len(row_tokens) // length)
    tokens = np.full(blocks * length + 1, eos, np.int32)
    tokens[1 : len(row_tokens) + 1] = row_tokens
    scored = np.zeros(blocks * length, np.bool_)
    scored[: len(row_tokens)] = np.concatenate([scored_mask(row, "stream") for row in rows])
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
    documents = document_ids(windows[:, :-1], eos) if config.document_mask else None
    return windows, scored.reshape(blocks, length), documents


def _whole(
    rows: Sequence[Encoded], config: DataConfig, eos: int, fills: bool
) -> tuple[Tokens, Mask, DocumentIds | None]:
    length = config.sequence_length
    blocks = [
        block_of([rows[number] for number in numbers], eos=eos, sequence_length=length, fills=fills)
        for numbers in packed([len(row.ids) for row in rows], length, fills=fills)
    ]
    tokens, scored, documents = map(np.stack, zip(*blocks, strict=True))
    return tokens, scored, documents if fills else None
