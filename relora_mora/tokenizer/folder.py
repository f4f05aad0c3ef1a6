"""What a tokenizer's folder holds: a sentencepiece model, and the Hugging Face files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer


MODEL_FILE = "tokenizer.model"
EXPECTED = "expected a folder with tokenizer.model, a sentencepiece .model file, or a Hugging Face tokenizer folder"
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


class TokenizerError(ValueError):
    """A tokenizer that cannot be used: what was given, what was expected, the remedy."""


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer in a folder."""
    return any((folder / name).is_file() for name in (MODEL_FILE, *_VOCABULARY_FILES))


def check_exists(path: Path) -> None:
    if path.is_dir():
        if not has_tokenizer(path):
            raise TokenizerError(f"{path}: no tokenizer in this folder; {EXPECTED}; tokenizer/train.py trains one")
    elif not path.exists():
        raise TokenizerError(
            f"{path}: not found; {EXPECTED}; tokenizer/train.py trains one, "
            "`hf download REPO --local-dir DIR` fetches one"
        )
    elif path.suffix != ".model":
        raise TokenizerError(f"{path}: a file of another kind; {EXPECTED}")


def sentencepiece_file(path: Path) -> Path | None:
    """The sentencepiece model that decides the ids; None: the Hugging Face files of the folder do."""
    if path.is_file():
        open_sentencepiece(path)
        return path
    model = path / MODEL_FILE
    if not model.is_file():
        return None
    described = read_json(path / "tokenizer.json")
    if described is None:
        open_sentencepiece(model)
        return model
    processor = _processor(model)
    if processor is None:  # a tiktoken file of that name, as with Llama 3
        return None
    if _names(described, path) != _pieces(processor) or not _goes_on_as_model(described, path, processor):
        return None
    return model


def open_sentencepiece(path: str | Path) -> SentencePieceProcessor:
    """sentencepiece's own tokenizer of a ``.model`` file; raises :class:`TokenizerError` when it is none."""
    processor = _processor(Path(path))
    if processor is None:
        raise TokenizerError(f"{path}: this is not a sentencepiece model; {EXPECTED}")
    return processor


def added_tokens(folder: Path, model: Path) -> dict[int, dict[str, Any]]:
    """What the Hugging Face files beside a sentencepiece model add to its pieces: settings of AddedToken by id.

    As tokenizers without ``tokenizer.json`` were saved. One of which nothing else is said is special, so that no text
    has it. Raises :class:`TokenizerError` where the files are damaged.
    """
    pieces = _pieces(open_sentencepiece(model))
    listed = read_json(folder / "added_tokens.json") or {}
    described = (read_json(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    try:
        found = {int(number): {"content": token, "special": True} for token, number in listed.items()}
        found |= {
            int(number): {key: value for key, value in token.items() if key != "__type"}
            for number, token in described.items()
        }
        return {number: found[number] for number in sorted(found) if found[number]["content"] not in pieces}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{folder}: its added tokens cannot be read; fetch or save the tokenizer again") from error


def read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON ({error}); fetch or save the tokenizer again") from error
    if not isinstance(content, dict):
        raise TokenizerError(
            f"{path}: holds a {type(content).__name__}, expected an object; fetch or save the tokenizer again"
        )
    return content


def read_tokenizer(file: Path) -> Tokenizer:
    """What a ``tokenizer.json`` describes; raises :class:`TokenizerError` where it cannot be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        remedy = "update tokenizers, or save it again"
        raise TokenizerError(f"{file}: tokenizers cannot read it ({error}); {remedy}") from error
    make_exact(tokenizer)
    return tokenizer


def make_exact(tokenizer: Tokenizer) -> None:
    """Switches off what whoever saved a tokenizer has left on: text is neither cut nor padded, and has one encoding."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None


def is_ordinary(token: str, folder: Path, model: Path | None) -> bool:
    """Whether a token is one of those that text is made of: neither an added nor a control token.

    ``model`` is the sentencepiece model that decides the ids, if there is one.
    """
    if model is not None:
        processor = open_sentencepiece(model)
        number = _pieces(processor).get(token)
        return number is not None and not processor.is_control(number)
    described = read_json(folder / "tokenizer.json")
    if described is None:
        return False
    added = {each["content"] for each in described.get("added_tokens", [])}
    return token not in added and token in _names(described, folder)


def _pieces(processor: SentencePieceProcessor) -> dict[str, int]:
    return {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}


def _names(described: dict[str, Any], folder: Path) -> dict[str, int]:
    """Token -> id of a ``tokenizer.json``."""
    try:
        vocab = described["model"]["vocab"]
        names = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        return names | {token["content"]: token["id"] for token in described.get("added_tokens", [])}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TokenizerError(
            f"{folder / 'tokenizer.json'}: damaged, its vocabulary cannot be read; fetch or save the tokenizer again"
        ) from error


def _goes_on_as_model(described: dict[str, Any], folder: Path, processor: SentencePieceProcessor) -> bool:
    """Whether text behind a special token is to a ``tokenizer.json`` what it is alone.

    To a model it is; a newer Llama or Mistral adds no space there, in the conversations that it was trained on.
    """
    special = next((token for token in described.get("added_tokens", []) if token.get("special")), None)
    if special is None:
        return True
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    return all(
        tokenizer.encode(special["content"] + text, add_special_tokens=False).ids
        == [special["id"], *processor.encode(text)]
        for text in ("a", " a")
    )


def _processor(model: Path) -> SentencePieceProcessor | None:
    from sentencepiece import SentencePieceProcessor

    content = model.read_bytes()
    if not content:  # sentencepiece takes it for a model without pieces
        return None
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError:
        return None
    return processor
