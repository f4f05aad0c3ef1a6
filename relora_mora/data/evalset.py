"""Held-out text, the same tokens each time on any number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relora_mora.config import DataConfig, TextSource, as_sources
from relora_mora.data.batch import UNSCORED, document_ids
from relora_mora.data.errors import SourceError
from relora_mora.data.packing import Tokens
from relora_mora.data.plain_text import texts_of
from relora_mora.data.rows import Ids
from relora_mora.data.sources import Shard, shards_of
from relora_mora.data.token_checks import check_tokens
from relora_mora.data.token_rows import open_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    EvalBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

_DOCUMENTS_PER_CALL = 64


@dataclass(frozen=True)
class EvalSet:
    """Whole documents as EOS, document, EOS, document, EOS: every token but the first is predicted once.

    Bits per byte are the summed nats over ``predicted`` tokens / ln 2 / ``utf8_bytes``: EOS is predicted and has no
    bytes.
    """

    tokens: Tokens  # int32 [predicted + 1]
    utf8_bytes: int
    documents: int
    sequence_length: int
    eos: int
    document_mask: bool = False

    @property
    def predicted(self) -> int:
        return len(self.tokens) - 1

    def batches(self, rank: int, world_size: int, micro_batch_size: int) -> Iterator[EvalBatch]:
        """(input_ids, labels, document_ids), each [micro_batch_size, sequence_length].

        Labels are shifted already, and ``UNSCORED`` where nothing is scored; document_ids are those of training, or
        None without ``document_mask``. Every rank gets the same number of batches (collectives need that), the last
        ones filled up with unscored sequences; over all ranks each token is scored once, those of the short last block
        too. No batch is larger than needed.
        """
        import torch

        length = self.sequence_length
        blocks = -(-self.predicted // length)
        micro_batch_size = min(micro_batch_size, -(-blocks // world_size))
        per_round = micro_batch_size * world_size
        for first in range(rank * micro_batch_size, -(-blocks // per_round) * per_round, per_round):
            inputs = np.full((micro_batch_size, length), self.eos, np.int64)
            labels = np.full((micro_batch_size, length), UNSCORED, np.int64)
            for row, block in enumerate(range(first, min(first + micro_batch_size, blocks))):
                piece = self.tokens[block * length : (block + 1) * length + 1]
                inputs[row, : len(piece) - 1] = piece[:-1]
                labels[row, : len(piece) - 1] = piece[1:]
            documents = torch.from_numpy(document_ids(inputs, self.eos)) if self.document_mask else None
            yield torch.from_numpy(inputs), torch.from_numpy(labels), documents


def load_eval_set(
    sources: str | Sequence[str | TextSource],
    *,
    config: DataConfig,
    tokenizer_path: str,
    sequence_length: int,
    max_tokens: int | None,
) -> EvalSet:
    """The first documents of the sources' validation split that have at most ``max_tokens`` tokens together; None: all.

    Of ``config`` the revision, the limits on lines and ``document_mask`` count. The first document is taken whatever
    its length. Raises SourceError when there is no text.
    """
    from relora_mora.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    pieces: list[Tokens] = [np.array([eos], np.int32)]
    predicted = 0
    utf8_bytes = 0
    shards = shards_of(sources, config, "validation")
    check_tokens(shards, tokenizer_path=tokenizer_path, eos=eos)
    for ids, size in documents(shards, config, tokenizer):
        if max_tokens is not None and len(pieces) > 1 and predicted + len(ids) + 1 > max_tokens:
            break
        pieces.append(np.array([*ids, eos], np.int32))
        predicted += len(ids) + 1
        utf8_bytes += size
    if len(pieces) == 1:
        given = ", ".join(source.source for source in as_sources(sources))
        raise SourceError(f"the validation data {given} holds no text; give a source with at least one document")
    return EvalSet(np.concatenate(pieces), utf8_bytes, len(pieces) - 1, sequence_length, eos, config.document_mask)


def documents(
    shards: Sequence[Shard], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Ids, int]]:
    """The tokens of each document and the UTF-8 bytes of its text, made many at a time or in advance."""
    from relora_mora.tokenizer import encode

    for made, some in itertools.groupby(shards, lambda shard: shard.tokens is not None):
        if made:
            for shard in some:
                with closing(open_tokens(shard)) as tokens:
                    yield from tokens.documents()
        else:
            texts = texts_of(some, config)
            while group := list(itertools.islice(texts, _DOCUMENTS_PER_CALL)):
                sizes = [len(text.encode()) for text in group]
                yield from zip(encode(tokenizer, group), sizes, strict=True)
