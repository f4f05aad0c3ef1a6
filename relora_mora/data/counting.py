"""How many tokens the training text has: what a run of some epochs must know before its schedule can be drawn."""

from __future__ import annotations

from relora_mora.config import DataConfig
from relora_mora.data.evalset import documents
from relora_mora.data.sources import configured_shards
from relora_mora.data.token_checks import epoch_tokens


def count_tokens(config: DataConfig, tokenizer_path: str) -> int:
    """Tokens of one epoch, with the EOS behind each document.

    Reads all of the text; of tokens made in advance the number is known. Raises SourceError.
    """
    from relora_mora.tokenizer import load_tokenizer

    shards = configured_shards(config, "train")
    known = epoch_tokens(shards)
    if known is not None:
        return known
    return sum(len(ids) + 1 for ids, _ in documents(shards, config, load_tokenizer(tokenizer_path)))
