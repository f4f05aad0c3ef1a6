"""Held-out text, the same tokens each time on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relora_mora.config import DataConfig
from relora_mora.data.lanes import Tokens
from relora_mora.data.sources import SourceError
from relora_mora.data.texts import iter_texts

if TYPE_CHECKING:
    import torch

UNSCORED = -100  # cross entropy's ignore_index
_DOCUMENTS_PER_CALL = 64


@dataclass(frozen=True)
class EvalSet:
    """Whole documents as EOS, document, EOS, document, EOS: every token but the first is predicted once.

    Bits per byte are the summed nats over ``predicted`` tokens / ln 2 / ``utf8_bytes``: EOS is predicted and counts no bytes.
    """

    tokens: Tokens  # int32 [predicted + 1]
    utf8_bytes: int
    documents: int
    sequence_length: int
    eos: int

    @property
    def predicted(self) -> int:
        return len(self.tokens) - 1

    def batches(self, rank: int, world_size: int, micro_batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(input_ids, labels), int64 [micro_batch_size, sequence_length], labels shifted already and -100 where nothing is scored.

        Every rank gets the same number of batches (collectives need that), the last ones filled up with unscored
        sequences; over all ranks each token is scored once, those of the short last block too.
        No batch is larger than needed.
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
            yield torch.from_numpy(inputs), torch.from_numpy(labels)


def load_eval_set(
    sources: str | list[str], *, config: DataConfig, tokenizer_path: str, sequence_length: int, max_tokens: int | None
) -> EvalSet:
    """The first documents of the sources' validation split that have at most ``max_tokens`` tokens together; None: all of them.

    The first document is taken whatever its length. Raises SourceError when there is no text.
    """
    from relora_mora.tokenizer import encode, load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    pieces: list[Tokens] = [np.array([eos], np.int32)]
    predicted = utf8_bytes = 0
    for texts in _groups(iter_texts(sources, split="validation", config=config)):
        for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
            if max_tokens is not None and len(pieces) > 1 and predicted + len(ids) + 1 > max_tokens:
                return EvalSet(np.concatenate(pieces), utf8_bytes, len(pieces) - 1, sequence_length, eos)
            pieces.append(np.array([*ids, eos], np.int32))
            predicted += len(ids) + 1
            utf8_bytes += len(text.encode())
    if len(pieces) == 1:
        raise SourceError(f"the validation data {sources} holds no text; give a source with at least one document")
    return EvalSet(np.concatenate(pieces), utf8_bytes, len(pieces) - 1, sequence_length, eos)


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == _DOCUMENTS_PER_CALL:
            yield group
            group = []
    if group:
        yield group
