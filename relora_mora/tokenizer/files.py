"""The files of a tokenizer's folder: a sentencepiece model, and the Hugging Face files next to it."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


MODEL_FILE = "tokenizer.model"
DESCRIPTION = "tokenizer.json"
EXPECTED = "expected a folder with tokenizer.model or tokenizer.json, or a sentencepiece .model file"


class TokenizerError(ValueError):
    """A tokenizer that cannot be used: what was given, what was expected, the remedy."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in (MODEL_FILE, DESCRIPTION))


def check_exists(path: Path) -> None:
    """Raises :class:`TokenizerError` if a path cannot be a tokenizer's by its name and those of its files."""
    if path.is_dir():
        fault = "" if has_tokenizer(path) else "this folder has no tokenizer"
    elif path.exists():
        fault = "" if path.suffix == ".model" else "not a sentencepiece .model file"
    else:
        fault = "not found"
    if fault:
        raise TokenizerError(
            f"{path}: {fault}; {EXPECTED}; relora-mora train-tokenizer trains one, `hf download REPO --local-dir DIR` "
            "fetches one, and AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes the tokenizer.json of an "
            "older one"
        )


def sentencepiece_file(path: Path) -> Path | None:
    """The sentencepiece model that decides the ids; None if a folder's Hugging Face files decide them."""
    if path.is_file():
        return path
    return None if (path / DESCRIPTION).is_file() else path / MODEL_FILE


def open_sentencepiece(path: str | Path) -> "SentencePieceProcessor":
    """sentencepiece's own tokenizer for a ``.model`` file; raises :class:`TokenizerError` if it is not such a file."""
    from sentencepiece import SentencePieceProcessor

    content = Path(path).read_bytes()
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError:
        content = b""
    if not content:  # which sentencepiece accepts as a model without pieces
        raise TokenizerError(f"{path}: not a sentencepiece model; {EXPECTED}")
    return processor
