"""Identifies a tokenizer, checks whether it fits a model, and saves it as a folder that plain transformers can load."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from relora_mora.tokenizer import files
from relora_mora.tokenizer.load import HARD_TEXTS, encode, from_folder, has_ids_of, load_tokenizer, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_IRRELEVANT = ("version", "truncation", "padding", "post_processor", "decoder")  # they do not change a text's ids


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The largest id plus one: the rows that a model's embedding needs. ``len(tokenizer)`` ignores gaps in the ids."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size_of_model: int, *, trained: bool = True) -> None:
    """Raises :class:`TokenizerError` if the ids exceed the model's.

    ``trained``: the model already has weights, so its vocabulary cannot change.
    """
    size = vocabulary_size(tokenizer)
    if size > vocab_size_of_model:
        remedy = f"set --model.overrides.vocab_size={size}, or use a smaller tokenizer"
        if trained:
            remedy = "use the tokenizer that the model was trained with, or add rows with model.new_tokens"
        raise files.TokenizerError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: {size} token ids, but the model has only "
            f"{vocab_size_of_model} (vocab_size); {remedy}"
        )


def tokenizer_fingerprint(path: str | Path, loaded: "PreTrainedTokenizerBase | None" = None) -> str:
    """A hash (16 hex digits) of everything that decides the ids; the same for a folder and its ``tokenizer.model``.

    It describes the loaded tokenizer, because a ``tokenizer.json`` can be written in several ways, and transformers
    rewrites parts of some. ``loaded`` is the result of :func:`load_tokenizer` for the path, if there is one already.
    Raises :class:`TokenizerError` like that function.
    """
    tokenizer = load_tokenizer(path) if loaded is None else loaded
    model = _equal_model(tokenizer, Path(path))
    if model is not None:
        return xxhash.xxh64(model.read_bytes()).hexdigest()
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    content = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _IRRELEVANT}
    return xxhash.xxh64(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _equal_model(tokenizer: "PreTrainedTokenizerBase", path: Path) -> Path | None:
    """The sentencepiece model at a tokenizer's path if it gives the same ids; None if there is no such model."""
    model = path if path.is_file() else path / files.MODEL_FILE
    try:
        reference = files.open_sentencepiece(model)
    except (OSError, files.TokenizerError):  # a tiktoken file of the same name, as in Llama 3
        return None
    end = tokenizer.eos_token
    # after a special token a newer Llama or Mistral adds no space, but its model does
    for text in ("a", " a"):
        ids = tokenizer.encode(f"{end}{text}", add_special_tokens=False, split_special_tokens=False)
        if ids != [tokenizer.eos_token_id, *reference.encode(text)]:
            return None
    return model if has_ids_of(tokenizer, reference) else None


def gives_same_tokens(path: str | Path, other: str | Path, loaded: "PreTrainedTokenizerBase | None" = None) -> bool:
    """Whether two tokenizers give the same ids, judging by their vocabularies and hard texts.

    They may even if their fingerprints differ: one has a ``tokenizer.model``, the other only a ``tokenizer.json``.
    ``loaded`` belongs to ``path``, as for :func:`tokenizer_fingerprint`.
    """
    first = load_tokenizer(path) if loaded is None else loaded
    second = load_tokenizer(other)
    return first.get_vocab() == second.get_vocab() and encode(first, HARD_TEXTS) == encode(second, HARD_TEXTS)


def save_tokenizer(tokenizer: "str | Path | PreTrainedTokenizerBase", out: str | Path) -> None:
    """Writes a folder from which plain ``AutoTokenizer.from_pretrained(out)`` gives the same ids.

    ``tokenizer.model`` is copied, too. If there is a chat template, which writes special tokens as text, plain
    transformers will parse them in text again. ``tokenizer`` is a path as for :func:`load_tokenizer`, or its result.
    ``out`` may already hold a model with its ``config.json``. Raises :class:`TokenizerError` if transformers refuses to
    write the folder, or the folder gives other ids.
    """
    from transformers import AutoTokenizer

    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    out = Path(out)
    name = Path(tokenizer.name_or_path)
    model = _equal_model(tokenizer, name)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with quiet_transformers():
            _save(tokenizer, out)
            if model is not None and model.resolve() != (out / files.MODEL_FILE).resolve():
                # not copyfile, whose error for a full disk names the file that it reads
                (out / files.MODEL_FILE).write_bytes(model.read_bytes())
            saved = from_folder(AutoTokenizer, out, name)
            written = [saved.encode(text, add_special_tokens=False, split_special_tokens=True) for text in HARD_TEXTS]
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # transformers' errors for wrong types
        reason = " ".join(str(error).split()).replace(str(out), str(name))
        raise files.TokenizerError(
            f"{name}: transformers cannot save it ({reason}); fix its tokenizer_config.json"
        ) from error
    if written != encode(tokenizer, HARD_TEXTS) or saved.eos_token_id != tokenizer.eos_token_id:
        raise files.TokenizerError(
            f"{name}: transformers gives other ids for it once it is saved; next to a model, give a tokenizer for that "
            "type of model"
        )


def _save(tokenizer: "PreTrainedTokenizerBase", out: Path) -> None:
    splits = tokenizer.split_special_tokens
    try:
        tokenizer.split_special_tokens = tokenizer.chat_template is None
        tokenizer.save_pretrained(str(out))
    finally:
        tokenizer.split_special_tokens = splits
    # replace two names that only transformers 5 knows by those of transformers 4, which other tools know
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
