"""Identifies a tokenizer, and checks whether it fits a model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from relora_mora.tokenizer.folder import TokenizerError, added_tokens, check_exists, sentencepiece_file
from relora_mora.tokenizer.load import HARD_TEXTS, encode, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_IRRELEVANT = ("version", "truncation", "padding", "post_processor", "decoder")  # they do not change a text's ids


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The largest id plus one: the rows that a model's embedding needs. ``len(tokenizer)`` ignores gaps in the ids."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", vocab_size_of_model: int, *, trained: bool = True
) -> str | None:
    """Raises :class:`TokenizerError` if the ids exceed the model's; returns a remark if many embeddings are unused.

    ``trained``: the model already has weights, so its vocabulary cannot change.
    """
    size = vocabulary_size(tokenizer)
    name = tokenizer.name_or_path or "the tokenizer"
    if size > vocab_size_of_model:
        remedy = f"set --model.overrides='{{vocab_size: {size}}}', or use a smaller tokenizer"
        if trained:
            remedy = "use the tokenizer that the model was trained with"
        raise TokenizerError(
            f"{name}: {size} token ids, but the model has only {vocab_size_of_model} (vocab_size); {remedy}"
        )
    unused = vocab_size_of_model - size
    if unused >= max(1024, size // 20):
        return (
            f"the model has {vocab_size_of_model} embeddings, but {unused} of them are never used: "
            f"{name} has only {size} token ids"
        )
    return None


def tokenizer_fingerprint(path: str | Path, loaded: "PreTrainedTokenizerBase | None" = None) -> str:
    """A hash (16 hex digits) of everything that decides the ids; the same for a folder and its ``tokenizer.model``.

    It describes the loaded tokenizer, because a ``tokenizer.json`` can be written in several ways, and transformers
    rewrites parts of some. ``loaded`` is the result of :func:`load_tokenizer` for the path, if there is one already.
    Raises :class:`TokenizerError` like that function.
    """
    path = Path(path)
    check_exists(path)
    model = sentencepiece_file(path)
    if model is not None and not (path.is_dir() and added_tokens(path, model)):
        return xxhash.xxh64(model.read_bytes()).hexdigest()
    tokenizer = load_tokenizer(path) if loaded is None else loaded
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any
    if backend is None:
        content = sorted(tokenizer.get_vocab().items())
    else:
        content = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _IRRELEVANT}
    return xxhash.xxh64(json.dumps(content, sort_keys=True).encode()).hexdigest()


def gives_same_tokens(path: str | Path, other: str | Path, loaded: "PreTrainedTokenizerBase | None" = None) -> bool:
    """Whether two tokenizers give the same ids, judging by their vocabularies and hard texts.

    They may even if their fingerprints differ: one has a ``tokenizer.model``, the other only a ``tokenizer.json``.
    ``loaded`` belongs to ``path``, as for :func:`tokenizer_fingerprint`. Raises :class:`TokenizerError` like
    :func:`load_tokenizer`.
    """
    if tokenizer_fingerprint(path, loaded) == tokenizer_fingerprint(other):
        return True
    first = load_tokenizer(path) if loaded is None else loaded
    second = load_tokenizer(other)
    return first.get_vocab() == second.get_vocab() and encode(first, HARD_TEXTS) == encode(second, HARD_TEXTS)


def is_tokenizer(path: str | Path, fingerprint: str) -> bool:
    """Whether the path has a tokenizer that can be loaded and has this fingerprint."""
    try:
        return tokenizer_fingerprint(path, load_tokenizer(path)) == fingerprint
    except (ValueError, OSError):
        return False
