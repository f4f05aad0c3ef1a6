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

# sentencepiece silently drops longer "sentences": two thirds of a web corpus, if it gets whole documents
SENTENCE_BYTES = 4192
# it also drops every sentence with one of these: its marks for a space and for unknown characters, and NUL
_CUT = re.compile("[\n\0\u2581\u2585]")
_LINE_CHARACTERS = SENTENCE_BYTES // 4  # UTF-8 takes at most 4 bytes

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
    """The documents' lines, cut at characters for which sentencepiece drops a line; long lines are cut at a space."""
    for document in documents:
        for line in _CUT.split(document):
            begin = 0
            while len(line) - begin > _LINE_CHARACTERS:
                space = line.rfind(" ", begin + 1, begin + _LINE_CHARACTERS)
                end = space if space > 0 else begin + _LINE_CHARACTERS
                yield line[begin:end]
                begin = end
            if begin < len(line):
                yield line[begin:]


def train(
    documents: Iterable[str], *, vocab_size: int, character_coverage: float = 0.99995, threads: int | None = None
) -> bytes:
    """The content of a ``tokenizer.model``; raises TokenizerError if ``vocab_size`` does not fit the text."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(documents),
            model_writer=model,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            num_threads=threads or min(16, os.cpu_count() or 1),
            **SETTINGS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise TokenizerError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def write(model: bytes, out: Path, documents: list[str]) -> float:
    """Checks the model on the documents and on hard texts, then writes the folder; returns UTF-8 bytes per token."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / MODEL_FILE
    file.write_bytes(model)
    tokenizer = load_tokenizer(file)
    reference = open_sentencepiece(file)

    def checked(text: str) -> int:
        """The number of its tokens; raises TokenizerError if the ids are not exact."""
        [ids] = encode(tokenizer, [text])
        exact = text.replace("\u2581", " ")  # sentencepiece's mark for a space is the only character that is lost
        if ids != reference.encode(text) or tokenizer.decode(ids) != exact:
            fault = f"the trained tokenizer is not exact for the text {text[:80]!r}"
            raise TokenizerError(f"{fault}; update sentencepiece and transformers")
        return len(ids)

    for text in HARD_TEXTS:
        checked(text)
    tokens = sum(map(checked, documents))
    save_tokenizer(tokenizer, out)
    return sum(len(text.encode()) for text in documents) / max(1, tokens)


def _explain(message: str, vocab_size: int) -> str:
    """Explains sentencepiece's message for a vocabulary that does not fit the text, with the remedy."""
    if high := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        return (
            f"--vocab_size={vocab_size}: this text has only {high[1]} different pieces; "
            f"give more text (--max_bytes, --max_documents, --data), or --vocab_size={high[1]} at most"
        )
    if low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab_size={vocab_size}: this text's characters and the bytes already take {low[1]} pieces; "
            "give a larger size, or a lower --character_coverage such as 0.9995 "
            "(rarer characters then become bytes)"
        )
    if "sentences_.empty()" in message:
        return "no line of this text can be used to train a tokenizer; give a source with text"
    return f"sentencepiece cannot train on this text: {message}"
