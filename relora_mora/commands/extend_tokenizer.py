"""Adds tokens to a tokenizer, for a model that continues on other text. See docs/finetuning.md."""

import time
from pathlib import Path

from relora_mora.cli.arguments import NonNegativeInt, PositiveInt
from relora_mora.commands.train_tokenizer import sampled
from relora_mora.system.bars import Bar
from relora_mora.system.files import new_folder
from relora_mora.system.process import many_imports
from relora_mora.tokenizer.files import TokenizerError

_HELD_OUT = 10  # each tenth document is only measured


def main(
    tokenizer: str,
    out: str,
    *,
    data: str,
    pieces: PositiveInt = 1000,
    list: str | None = None,
    seed: int = 0,
    max_documents: NonNegativeInt = 1_000_000,
    max_bytes: PositiveInt = 64 * 1024 * 1024,
    **overrides: str,
) -> None:
    """Adds tokens to a tokenizer.

    It continues the training of a BPE tokenizer on your text, and keeps all old ids. Then it prints the bytes per
    token of held-out text, before and after. A run with model.init_from and model.new_tokens trains a model with it.

    Arguments:
        tokenizer: a folder with a tokenizer, such as the model's, or a sentencepiece .model file
        out: the folder to write; it must be new or empty
        data: a source of text as in a run's data.train (path, glob, url, hub:OWNER/NAME/PATTERN, allenai/c4), or a YAML
            list of them; each tenth document is held out
        overrides: how the text is read, as --data.KEY=VALUE, for instance --data.sample_by=document;
            docs/settings.md lists them

    Tokens:
        pieces: number of tokens to learn from the text
        list: a file with the tokens to add, instead of learning them: one per line, exactly as it is in text; a word
            that follows a space begins with the space

    Sample of the text:
        max_documents: read at most this many documents, from the first shard on; 0: all
        max_bytes: learn from a random sample of at most this many bytes of the documents read
        seed: seed of the sample of documents

    Example:
        relora-mora extend-tokenizer models/smollm2 tokenizers/extended --data='texts/*.txt' --pieces=1000
    """
    started = time.monotonic()
    with many_imports():
        from relora_mora.tokenizer.extend import Extension
        from relora_mora.tokenizer.identity import vocabulary_size

    wanted = None if list is None else _lines(Path(list))
    extension = Extension(tokenizer)
    before = vocabulary_size(extension.tokenizer)
    with new_folder(Path(out)) as folder:
        documents = sampled(data, overrides, max_documents=max_documents, max_bytes=max_bytes, seed=seed)
        held_out = documents[::_HELD_OUT]
        if len(documents) < 2:
            raise TokenizerError(
                f"{data}: one document with text, and one is held out; give more, or split it with "
                "--data.sample_by=paragraph"
            )
        with Bar("adding tokens"):
            if wanted is None:
                extension.learn((text for number, text in enumerate(documents) if number % _HELD_OUT), pieces)
            else:
                extension.add(wanted)
        with Bar("checking the tokenizer"):
            old, new = extension.save(folder, held_out)
    added = len(extension.tokens)
    print(
        f"wrote {out}: {added:,} new tokens, {before + added:,} token ids, {time.monotonic() - started:.1f} s\n"
        f"bytes per token of {len(held_out):,} held-out documents: {old:.3f} before, {new:.3f} after "
        f"({old / new - 1:+.1%} tokens)\n"
        f"use it with --tokenizer.path={out} --model.new_tokens=mean_of_pieces"
    )


def _lines(path: Path) -> list[str]:
    """The pieces in a file, each once."""
    try:
        pieces = [line for line in dict.fromkeys(path.read_text(encoding="utf-8-sig").splitlines()) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"--list: cannot read {path} ({error}); give a text file") from error
    if not pieces:
        raise TokenizerError(f"--list: {path} has no pieces; write one per line")
    return pieces
