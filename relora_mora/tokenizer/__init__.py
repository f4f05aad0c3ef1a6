"""The tokenizer: loaded exactly, never parsing text for special tokens.

A ``tokenizer.model`` of sentencepiece can be wrapped for transformers in several ways, most of them subtly wrong: as a
``LlamaTokenizer`` it loses a leading space and takes a crawled ``</s>`` for the end of a document. What is right here
is a folder that holds nothing but the model, loaded with ``split_special_tokens=True``; every load compares its ids
with sentencepiece's own.
"""

from relora_mora.tokenizer.folder import MODEL_FILE, TokenizerError, has_tokenizer, open_sentencepiece
from relora_mora.tokenizer.identity import (
    check_vocabulary,
    gives_same_tokens,
    is_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from relora_mora.tokenizer.load import HARD_TEXTS, encode, load_tokenizer, quiet_transformers
from relora_mora.tokenizer.save import save_tokenizer

__all__ = [
    "HARD_TEXTS",
    "MODEL_FILE",
    "TokenizerError",
    "check_vocabulary",
    "encode",
    "gives_same_tokens",
    "has_tokenizer",
    "is_tokenizer",
    "load_tokenizer",
    "open_sentencepiece",
    "quiet_transformers",
    "save_tokenizer",
    "tokenizer_fingerprint",
    "vocabulary_size",
]
