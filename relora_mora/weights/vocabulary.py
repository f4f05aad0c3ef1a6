"""Rows of embeddings and head for tokens that a tokenizer has, and the tokenizer of ``model.init_from`` has not."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config
from relora_mora.model.causal import ends_of
from relora_mora.system.seeds import derived_seed
from relora_mora.tokenizer.files import TokenizerError
from relora_mora.tokenizer.identity import vocabulary_size
from relora_mora.tokenizer.load import encode, load_tokenizer
from relora_mora.weights.load import own_tokenizer_path, start_config

MULTIPLE = 64  # of rows: matrix units prefer such a vocabulary
_BEFORE = "\n"  # no tokenizer joins it with the text after it


@dataclass(frozen=True)
class NewTokens:
    """The ids from ``first`` up to ``end`` are new; the model of ``model.init_from`` has ``rows``."""

    old: PreTrainedTokenizerBase | None  # None if the model comes without a tokenizer
    new: PreTrainedTokenizerBase
    first: int
    end: int
    rows: int
    vocab_size: int  # of this run

    def pieces(self, number: int) -> list[int]:
        """The old ids of a new token's text; empty if it is not a text, such as some bytes of a character."""
        assert self.old is not None
        [before] = encode(self.new, [_BEFORE])
        text = str(self.new.decode([*before, number])).removeprefix(str(self.new.decode(before)))
        lead, ids = encode(self.old, [_BEFORE, _BEFORE + text])
        if "\ufffd" in text or ids[: len(lead)] != lead:
            return []
        return [each for each in ids[len(lead) :] if each < self.first]


def with_vocabulary(config: Config) -> Config:
    """Sets a null ``tokenizer.path`` to the tokenizer of ``model.init_from``, and what follows from
    ``model.new_tokens``: the size of the vocabulary, and the first row that trains.

    Raises :class:`ConfigError` if old tokens would change. Model and tokenizer are checked later.
    """
    if config.tokenizer.path is None:
        path = own_tokenizer_path(Path(str(config.model.init_from)))
        config = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": str(path)})})
    if config.model.new_tokens is None:
        return config
    try:
        found = _new_tokens(config)
    except ValueError:
        return config
    if faults := list(_faults(found, config)):
        raise ConfigError(faults, "the settings")
    overrides = {**config.model.overrides, "vocab_size": found.vocab_size}
    changes: dict[str, Any] = {"model": config.model.model_copy(update={"overrides": overrides})}
    if config.method.train_embeddings == "new":
        changes["method"] = config.method.model_copy(update={"train_embeddings": found.first})
    return config.model_copy(update=changes)


def _new_tokens(config: Config) -> NewTokens:
    path = Path(str(config.model.init_from))
    rows = start_config(path).vocab_size
    new = load_tokenizer(config.tokenizer_path)
    old = None
    with contextlib.suppress(TokenizerError):
        old = load_tokenizer(own_tokenizer_path(path))
    end = vocabulary_size(new)
    size = -(-max(rows, end) // MULTIPLE) * MULTIPLE
    first = rows if old is None else min(rows, vocabulary_size(old))
    return NewTokens(old, new, first, end, rows, config.model.overrides.get("vocab_size", size))


def _faults(found: NewTokens, config: Config) -> Iterator[str]:
    least = max(found.rows, found.end)
    if found.vocab_size < least:
        yield f"model.overrides.vocab_size: {found.vocab_size}, expected at least {least}; leave it out"
    if found.old is None and config.model.new_tokens == "mean_of_pieces":
        yield "model.new_tokens: mean_of_pieces needs the tokenizer of model.init_from, which is not there; use mean"
    ids = found.new.get_vocab()
    before = {} if found.old is None else found.old.get_vocab()
    moved = [token for token, number in before.items() if ids.get(token) != number]
    if moved:
        yield (
            f"model.new_tokens: {len(moved)} tokens of model.init_from, such as {min(moved)!r}, have other ids in "
            f"{config.tokenizer_path}; extend its own tokenizer with relora-mora extend-tokenizer"
        )
    if config.method.train_embeddings == "new" and found.first >= found.end:
        yield (
            f"method.train_embeddings: new, but {config.tokenizer_path} has no token that model.init_from lacks; give "
            "the first id whose row trains"
        )


def add_rows(weights: dict[str, Tensor], lm: PreTrainedModel, config: Config) -> None:
    """Adds the rows of ``model.new_tokens`` to the float32 weights of ``model.init_from``.

    Rows without a token get the mean of the old ones, whose logits are low.
    """
    if config.model.new_tokens is None:
        return
    found = _new_tokens(config)
    embedding, head = ends_of(lm)
    for name in weights.keys() & {embedding, head, f"{head.removesuffix('weight')}bias"}:
        old = weights[name][: found.first]
        mean = old.mean(0)
        rows = weights[name].new_empty(found.vocab_size, *mean.shape).copy_(mean)
        rows[: found.rows] = weights[name]
        for number in range(found.first, found.end):
            pieces = found.pieces(number) if config.model.new_tokens == "mean_of_pieces" else []
            rows[number] = old[pieces].mean(0) if pieces else mean
        if config.model.new_tokens == "normal":
            generator = torch.Generator().manual_seed(derived_seed(config.train.seed, "new tokens", name))
            noise = torch.randn(found.end - found.first, *mean.shape, generator=generator)
            rows[found.first : found.end] += noise * old.std(0)
        weights[name] = rows
