"""The files of a tokenizer's folder: a sentencepiece model, and the Hugging Face files next to it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer


MODEL_FILE = "tokenizer.model"
MOST_PIECES = 10_000_000  # of a vocabulary
EXPECTED = "expected a folder with tokenizer.model, a sentencepiece .model file, or a Hugging Face tokenizer folder"
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


class TokenizerError(ValueError):
    """A tokenizer that cannot be used: what was given, what was expected, the remedy."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in (MODEL_FILE, *_VOCABULARY_FILES))


def check_exists(path: Path) -> None:
    if path.is_dir():
        if not has_tokenizer(path):
            raise TokenizerError(
                f"{path}: this folder has no tokenizer; {EXPECTED}; relora-mora train-tokenizer trains one"
            )
    elif not path.exists():
        raise TokenizerError(
            f"{path}: not found; {EXPECTED}; relora-mora train-tokenizer trains one, "
            "`hf download REPO --local-dir DIR` fetches one"
        )
    elif path.suffix != ".model":
        raise TokenizerError(f"{path}: not a sentencepiece .model file; {EXPECTED}")


def sentencepiece_file(path: Path) -> Path | None:
    """The sentencepiece model that decides the ids; None if the folder's Hugging Face files decide them."""
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
    if processor is None:  # a tiktoken file of the same name, as in Llama 3
        return None
    if _names(described, path) != _pieces(processor) or not _continues_like_model(described, path, processor):
        return None
    return model


def open_sentencepiece(path: str | Path) -> "SentencePieceProcessor":
    """sentencepiece's own tokenizer for a ``.model`` file; raises :class:`TokenizerError` if it is not such a file."""
    processor = _processor(Path(path))
    if processor is None:
        raise TokenizerError(f"{path}: not a sentencepiece model; {EXPECTED}")
    return processor


def added_tokens(folder: Path, model: Path) -> dict[int, dict[str, Any]]:
    """The tokens that Hugging Face files next to a sentencepiece model add to it: settings of AddedToken, by id.

    Tokenizers were saved like this before ``tokenizer.json``. A token without further settings is special, so that no
    text can have it. Raises :class:`TokenizerError` if the files are damaged.
    """
    pieces = _pieces(open_sentencepiece(model))
    listed = read_json(folder / "added_tokens.json") or {}
    described = (read_json(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    try:
        tokens = {int(number): {"content": token, "special": True} for token, number in listed.items()}
        tokens |= {
            int(number): {key: value for key, value in token.items() if key != "__type"}
            for number, token in described.items()
        }
        return {number: tokens[number] for number in sorted(tokens) if tokens[number]["content"] not in pieces}
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


def read_tokenizer(file: Path) -> "Tokenizer":
    """The tokenizer in a ``tokenizer.json``; raises :class:`TokenizerError` if it cannot be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no more specific error
        remedy = "update tokenizers, or save it again"
        raise TokenizerError(f"{file}: tokenizers cannot read it ({error}); {remedy}") from error
    make_exact(tokenizer)
    return tokenizer


def make_exact(tokenizer: "Tokenizer") -> None:
    """Turns off truncation, padding and dropout, which may have been on when the tokenizer was saved."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None


def is_ordinary(token: str, folder: Path, model: Path | None) -> bool:
    """Whether ordinary text can contain the token: it is neither an added nor a control token.

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


def _pieces(processor: "SentencePieceProcessor") -> dict[str, int]:
    return {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}


def _names(described: dict[str, Any], folder: Path) -> dict[str, int]:
    """The ids in a ``tokenizer.json``, by token."""
    try:
        vocab = described["model"]["vocab"]
        names = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        return names | {token["content"]: token["id"] for token in described.get("added_tokens", [])}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TokenizerError(
            f"{folder / 'tokenizer.json'}: damaged; its vocabulary cannot be read; fetch or save the tokenizer again"
        ) from error


def _continues_like_model(described: dict[str, Any], folder: Path, processor: "SentencePieceProcessor") -> bool:
    """Whether ``tokenizer.json`` gives text after a special token the same ids as text at the beginning.

    A sentencepiece model does. A newer Llama or Mistral adds no space there in the conversations of its training.
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


def _processor(model: Path) -> "SentencePieceProcessor | None":
    from sentencepiece import SentencePieceProcessor

    content = model.read_bytes()
    if not content:  # sentencepiece would accept it as a model without pieces
        return None
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError:
        return None
    return processor
