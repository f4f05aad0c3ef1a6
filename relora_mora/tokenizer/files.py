"""The files of a tokenizer's folder: a sentencepiece model, and the Hugging Face files next to it."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


MODEL_FILE = "tokenizer.model"
DESCRIPTION = "tokenizer.json"
MOST_PIECES = 10_000_000  # of a vocabulary
EXPECTED = "expected a folder with tokenizer.model or tokenizer.json, or a sentencepiece .model file"


class TokenizerError(ValueError):
    """A tokenizer that cannot be used: what was given, what was expected, the remedy."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in (MODEL_FILE, DESCRIPTION))


def check_exists(path: Path) -> None:
    """Raises :class:`TokenizerError` if a path cannot be a tokenizer's by its name and those of its files."""
    fault = None
    if path.is_dir():
        fault = None if has_tokenizer(path) else "this folder has no tokenizer"
    elif not path.exists():
        fault = "not found"
    elif path.suffix != ".model":
        fault = "not a sentencepiece .model file"
    if fault:
        remedy = (
            "relora-mora train-tokenizer trains one, `hf download REPO --local-dir DIR` fetches one, and "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes the tokenizer.json of an older one"
        )
        raise TokenizerError(f"{path}: {fault}; {EXPECTED}; {remedy}")


def sentencepiece_file(path: Path) -> Path | None:
    """The sentencepiece model that decides the ids; None if a folder's Hugging Face files decide them."""
    if path.is_file():
        return path
    model = path / MODEL_FILE
    return model if model.is_file() and not (path / DESCRIPTION).is_file() else None


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


def pieces_of(processor: "SentencePieceProcessor") -> dict[str, int]:
    """The ids of a sentencepiece model, by piece."""
    return {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}


def is_ordinary(token: str, path: Path) -> bool:
    """Whether ordinary text can contain a tokenizer's token: it is neither an added nor a control token."""
    model = sentencepiece_file(path)
    if model is not None:
        processor = open_sentencepiece(model)
        return not processor.is_control(pieces_of(processor)[token])
    from tokenizers import Tokenizer

    described = Tokenizer.from_file(str(path / DESCRIPTION))
    added = {each.content for each in described.get_added_tokens_decoder().values()}
    return token not in added and described.token_to_id(token) is not None
