"""How many tokens the training text has: what a run of some epochs must know before its schedule can be drawn."""

from __future__ import annotations

from relora_mora.config import DataConfig
from relora_mora.data.evalset import encoded
from relora_mora.data.plain_text import iter_texts


def count_tokens(config: DataConfig, tokenizer_path: str) -> int:
    """Tokens of one epoch, with the EOS behind each document. Reads all of the text; raises SourceError."""
    from relora_mora.tokenizer import load_tokenizer

    texts = iter_texts(config.train, split="train", config=config)
    return sum(len(ids) + 1 for _, ids in encoded(texts, load_tokenizer(tokenizer_path)))
