"""Trains a sentencepiece BPE tokenizer with byte fallback on a sample of texts, and writes its folder.

The folder gives exactly sentencepiece's ids in ``AutoTokenizer.from_pretrained``. See tokenizer/README.md.
"""

import heapq
import io
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from relora_mora.tokenizer.files import MODEL_FILE, TokenizerError, open_sentencepiece
from relora_mora.tokenizer.identity import save_tokenizer
from relora_mora.tokenizer.load import HARD_TEXTS, encode, load_tokenizer

# sentencepiece silently drops longer lines, and lines with its marks for a space and for unknown characters, or NUL
SENTENCE_BYTES = 1 << 16
_SENTENCE = re.compile(f"[^\n\0\u2581\u2585]{{1,{SENTENCE_BYTES // 4}}}")  # a character takes at most 4 bytes

SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    # together these ensure decode(encode(text)) == text, and that the ids of a text's parts decode to the parts
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "required_chars": "\u2581",  # means a space; after training on text without spaces, it would have no token
    "max_sentence_length": SENTENCE_BYTES,
    "input_sentence_size": 0,  # use everything, because this module already draws a sample of documents
    "minloglevel": 2,
}


def sample(texts: Iterable[str], *, max_bytes: int, seed: int) -> tuple[list[str], int]:
    """A uniform random sample of at most ``max_bytes`` of UTF-8, in the order read, and the number of texts read.

    Each document draws a number, and those with the smallest numbers are kept. This takes one pass and only the
    sample's memory. A document that exceeds the limit by itself is left out.
    """
    draw = random.Random(seed)
    total = 0
    read = 0
    kept: list[tuple[float, int, int, str]] = []  # heap of (-number drawn, position, bytes, text): largest number first
    for read, text in enumerate(texts, start=1):
        size = len(text.encode())
        key = draw.random()
        if size > max_bytes or (total + size > max_bytes and kept and key > -kept[0][0]):
            continue
        heapq.heappush(kept, (-key, read, size, text))
        total += size
        while total > max_bytes:
            total -= heapq.heappop(kept)[2]
    return [text for _, _, _, text in sorted(kept, key=lambda item: item[1])], read


def sentences(documents: Iterable[str]) -> Iterator[str]:
    """The documents' lines, cut at characters for which sentencepiece drops a line, and if they are too long."""
    for document in documents:
        yield from _SENTENCE.findall(document)


def train(documents: Iterable[str], *, vocab_size: int, character_coverage: float = 0.99995) -> bytes:
    """The content of a ``tokenizer.model``; raises TokenizerError if ``vocab_size`` does not fit the text."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(documents),
            model_writer=model,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            num_threads=min(16, os.cpu_count() or 1),
            **SETTINGS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).rpartition("] ")[2].strip(" .") or "it has no line of text"
        raise TokenizerError(
            f"sentencepiece cannot train --vocab_size={vocab_size} on this text: {reason}; give another size, more "
            "text, or a lower --character_coverage, with which rare characters become bytes"
        ) from error
    return model.getvalue()


def write(model: bytes, out: Path, documents: list[str]) -> float:
    """Checks the model on the documents and on hard texts, then writes the folder; returns UTF-8 bytes per token."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / MODEL_FILE
    file.write_bytes(model)
    tokenizer = load_tokenizer(file)
    texts = [*HARD_TEXTS, *documents]
    ids = encode(tokenizer, texts)
    references = open_sentencepiece(file).encode(texts)
    for text, own, reference in zip(texts, ids, references, strict=True):
        # sentencepiece's mark for a space is the only character that is lost
        if own != reference or tokenizer.decode(own) != text.replace("\u2581", " "):
            raise TokenizerError(
                f"the trained tokenizer is not exact for the text {text[:80]!r}; update sentencepiece and transformers"
            )
    save_tokenizer(tokenizer, out)
    tokens = sum(map(len, ids[len(HARD_TEXTS) :]))
    return sum(len(text.encode()) for text in documents) / max(1, tokens)
