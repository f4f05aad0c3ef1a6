"""Trains a tokenizer on any source that the trainer can read."""

import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from relora_mora.cli.arguments import NonNegativeInt, PositiveInt
from relora_mora.system.bars import Bar
from relora_mora.system.files import new_folder
from relora_mora.system.process import many_imports
from relora_mora.tokenizer.files import TokenizerError

_FEWEST_PIECES = 3 + 256 + 1  # unk, bos, eos, bytes, and one more
_MOST_PIECES = 10_000_000
_CHECKED_DOCUMENTS = 1000


def main(
    data: str,
    out: str,
    *,
    vocab_size: Annotated[int, Ge(_FEWEST_PIECES), Le(_MOST_PIECES)] = 32000,
    seed: int = 0,
    max_documents: NonNegativeInt = 1_000_000,
    max_bytes: PositiveInt = 256 * 1024 * 1024,
    character_coverage: Annotated[float, Ge(0.9), Le(1)] = 0.99995,
    **overrides: str,
) -> None:
    """Trains a tokenizer on a text.

    It is a sentencepiece BPE tokenizer with byte fallback, in a folder that transformers loads. It trains with a thread
    per core, at most 16.

    Arguments:
        data: a source of text as in a run's data.train (path, glob, url, hub:OWNER/NAME/PATTERN, allenai/c4), or a YAML
            list of them
        out: the folder to write; it must be new or empty
        overrides: how the text is read, as --data.KEY=VALUE, for instance --data.sample_by=document;
            docs/settings.md lists them

    Tokenizer:
        vocab_size: number of token ids, including unk, bos, eos (0, 1, 2) and the 256 bytes; at least 260
        character_coverage: fraction of the text's characters that get a piece of their own; others become bytes

    Sample of the text:
        max_documents: read at most this many documents, from the first shard on; 0: all
        max_bytes: train on a random sample of at most this many bytes of the documents read; it is held in memory
        seed: seed of the sample of documents

    Example:
        relora-mora train-tokenizer --data='texts/*.txt' --data.sample_by=document --out=tokenizers/mine
    """
    started = time.monotonic()
    with many_imports():
        from relora_mora.tokenizer.training import train, write

    with new_folder(Path(out)) as folder:
        documents = sampled(data, overrides, max_documents=max_documents, max_bytes=max_bytes, seed=seed)
        with Bar("training the tokenizer"):
            model = train(documents, vocab_size=vocab_size, character_coverage=character_coverage)
        with Bar("checking the tokenizer"):
            bytes_per_token = write(model, folder, documents[:: len(documents) // _CHECKED_DOCUMENTS + 1])
    seconds = time.monotonic() - started
    print(
        f"wrote {out}: {vocab_size:,} token ids, {bytes_per_token:.2f} bytes per token, {seconds:.1f} s\n"
        f"use it with --tokenizer.path={out} and a model whose vocab_size is at least {vocab_size}"
    )


def sampled(data: str, overrides: Mapping[str, str], *, max_documents: int, max_bytes: int, seed: int) -> list[str]:
    """A sample of the documents of ``--data``; raises ValueError if its settings are wrong or it has no text."""
    with many_imports():
        from relora_mora.config.load import READING, parse_typed, read_data
        from relora_mora.data.read import iter_texts
        from relora_mora.tokenizer.training import sample

    config = read_data({"train": parse_typed(data, "--data"), "validation": "none"}, overrides, READING)
    if len({source.weight for source in config.train}) > 1:
        raise TokenizerError("--data: sources are read one after the other, without weights; leave the weights out")
    texts = iter_texts(config.train, split="train", config=config)
    with Bar("reading the text", "document", after=0.0) as bar:
        documents, read = sample(bar.over(islice(texts, max_documents or None)), max_bytes=max_bytes, seed=seed)
    if not documents:
        fault = "it has no text; give a source with text"
        if read:
            fault = f"none of its {read:,} documents fits --max_bytes={max_bytes}; raise it"
        raise TokenizerError(f"{data}: {fault}")
    size = sum(len(text.encode()) for text in documents)
    print(f"training on {len(documents):,} of the {read:,} documents read, {size / 1e6:,.1f} MB", flush=True)
    return documents
