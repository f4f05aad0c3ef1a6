"""What the tests of the tokenizer share: the training program, and text to train on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tools.helpers import ROOT

TEXT = [
    "the rank of a merge",
    "matrix over the rank",
    "größer als the matrix",
    "one more of the same",
    "0123456789 - abcdefghij",
]


def train_tokenizer(
    folder: Path, text: list[str] = TEXT, *, add_dummy_prefix: bool = False, control_symbols: Sequence[str] = ()
) -> None:
    """Puts a sentencepiece model with byte fallback and 300 pieces into a folder."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir(exist_ok=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
        control_symbols=list(control_symbols),
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def save_bytes_tokenizer(folder: Path) -> None:
    """Puts a tokenizer of Qwen's class into a folder, whose 257 tokens are the bytes and the end of a document."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    end = "<|endoftext|>"
    vocabulary = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), end])}
    Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=end, unk_token=end, pad_token=end).save_pretrained(folder)


def save_other_tokenizer(folder: Path, **config: Any) -> Path:
    """Puts a tokenizer.json into a folder that joins digits, and accents as they are: no class of a model does so.

    ``config`` is the tokenizer's; the end of a document is ``<|endoftext|>``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the 1000 2000 3.14 the Caf\u00e9 cafe\u0301\n\n"] * 20, trainer)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[0]} | config))
    return folder


def own_text() -> list[str]:
    """Enough text for a small vocabulary on every machine: the project's own sources."""
    return [path.read_text(encoding="utf-8") for path in sorted((ROOT / "relora_mora").rglob("*.py"))[:60]]
