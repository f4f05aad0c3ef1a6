"""How many tokens the training text has: what a run of some epochs must know before its schedule can be drawn."""

from __future__ import annotations

from relora_mora.config import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.evalset import documents
from relora_mora.data.sources import configured_shards
from relora_mora.data.token_checks import epoch_tokens


def count_tokens(config: DataConfig, tokenizer_path: str) -> int:
    """Tokens of one epoch, with the EOS behind each document.

    Reads all of the text; of tokens made in advance the number is known. Raises SourceError, also where there are none.
    """
    from relora_mora.tokenizer import load_tokenizer

    shards = configured_shards(config, "train")
    tokens = epoch_tokens(shards)
    if tokens is None:
        tokens = sum(len(ids) + 1 for ids, _ in documents(shards, config, load_tokenizer(tokenizer_path)))
    if not tokens:
        given = ", ".join(source.source for source in config.train_sources)
        raise SourceError(f"the training data {given} holds no text; give a source with at least one document")
    return tokens
