"""Loads tokenizers so that they are exact and never parse special tokens in text."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from relora_mora.tokenizer import files

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

# Texts on which conversions of a sentencepiece model go wrong: spaces at either end, names of special and byte tokens,
# bytes without a piece, whitespace that a normalizer would fold.
HARD_TEXTS = (
    "",
    " ",
    "  leading spaces",
    "trailing spaces  ",
    "long" + " " * 50 + "run" + " " * 7,
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "a</s>b <s> </s><unk> <0x0A><0xFF>",
    " </s> ",
    "\0",
    "NUL\0inside\0",
    "CR LF\r\nnext\r\n\r\nend\r",
    "\n\nnewlines\n \n",
    "\ttabs\t\tand \t spaces\t",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 é e\u0301 ﬁ ｆｕｌｌ ½ №",
    "\u00a0\u200b\u2028\ufeff no-break, zero width, line separator",
    "日本語 русский العربية हिन्दी 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u2585 \ufffd",
    "0123456789 3.14159 1,000,000",
    "DON'T (a+b)/c; //x  \n\n  y=_z",
    "The quick brown fox, it's said, \"jumps\" over 13 lazy dogs — doesn't it?",
)


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder with ``tokenizer.model``, a ``.model`` file, or a Hugging Face tokenizer folder.

    ``tokenizer.json`` decides the ids if there is one, and otherwise ``tokenizer.model``, whose ids are compared with
    sentencepiece's. Special tokens are never parsed in text, and dropout is turned off. Prints nothing and reads only
    the disk. Sets ``TOKENIZERS_PARALLELISM=false`` unless it is set, because worker processes already run in parallel.

    Raises :class:`TokenizerError` if no tokenizer is found, it has no end-of-document token, text could have that
    token, or its ids differ from sentencepiece's.
    """
    path = Path(path)
    files.check_exists(path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = files.sentencepiece_file(path)
    reference = None if model is None else files.open_sentencepiece(model)
    with quiet_transformers():
        tokenizer = _load(path)
    if reference is not None:
        _check_ids(tokenizer, reference, path)
    if tokenizer.eos_token_id is None:
        remedy = "name one as eos_token in tokenizer_config.json"
        if model is not None:
            remedy = "train the sentencepiece model with an eos_id, as relora-mora train-tokenizer does"
        raise files.TokenizerError(f"{path}: this tokenizer has no end-of-document token (eos); {remedy}")
    _check_end(tokenizer, path)
    return tokenizer


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens: none is added, and none is parsed in the text."""
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.encode_special_tokens = True  # pickling a tokenizer, as for a worker process, loses it
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Shows only errors from transformers' logger."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def auto_tokenizer(folder: Path, kind: Any = None, *, named: Path | None = None, **settings: Any) -> Any:
    """A transformers tokenizer loaded from a folder by ``AutoTokenizer``, or by the class ``kind``.

    Raises :class:`TokenizerError`, whose message names ``named`` instead of the folder.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = (kind or AutoTokenizer).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **settings
        )
    except Exception as error:  # transformers raises nearly any kind of error here
        name = named or folder
        reason = " ".join(str(error).split()).replace(str(folder), str(name))
        raise files.TokenizerError(
            f"{name}: transformers cannot load this tokenizer ({reason}); {files.EXPECTED}"
        ) from error
    # arguments of this call and names of code, which must not get into tokenizer_config.json
    for key in ("is_local", "local_files_only", "auto_map"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _check_ids(tokenizer: "PreTrainedTokenizerBase", reference: "SentencePieceProcessor", path: Path) -> None:
    """Raises :class:`TokenizerError` if a tokenizer has other tokens than its sentencepiece model, or other ids."""
    pieces = files.pieces_of(reference)
    others = [token for token, number in tokenizer.get_vocab().items() if pieces.get(token) != number]
    if others:
        call = f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
        raise files.TokenizerError(
            f"{path}: has tokens that {files.MODEL_FILE} does not have, such as {min(others)!r}, and no "
            f"{files.DESCRIPTION}; write one with {call}"
        )
    for text, ids in zip(HARD_TEXTS, encode(tokenizer, HARD_TEXTS), strict=True):
        if ids != reference.encode(text):
            raise files.TokenizerError(
                f"{path}: with transformers this model gives other ids than with sentencepiece, e.g. for {text!r}; "
                "update transformers, or train a tokenizer with relora-mora train-tokenizer"
            )


def _load(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in ``tokenizer.json``, or transformers' conversion of the sentencepiece model.

    ``AutoTokenizer`` would choose a class by names in the folder. Some classes, such as Qwen2Tokenizer, use only the
    vocabulary of ``tokenizer.json``, and split text by rules of their own.
    """
    from transformers import PreTrainedTokenizerFast

    config = path / "tokenizer_config.json"
    if config.is_file() and b'"auto_map"' in config.read_bytes():
        auto_tokenizer(path)  # refuses code from the folder
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as temporary:
        if path.is_file():
            shutil.copyfile(path, Path(temporary, files.MODEL_FILE))
        folder = path if path.is_dir() else Path(temporary)
        settings = {"split_special_tokens": True}
        if files.sentencepiece_file(path):
            settings["legacy"] = True  # otherwise its spaces would differ from sentencepiece's
        tokenizer = auto_tokenizer(folder, PreTrainedTokenizerFast, named=path, **settings)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(path)
    backend = tokenizer.backend_tokenizer  # these may have been on when it was saved
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    return cast("PreTrainedTokenizerBase", tokenizer)


def _check_end(tokenizer: "PreTrainedTokenizerBase", path: Path) -> None:
    """Raises :class:`TokenizerError` if text could have the token that ends a document."""
    end, number = str(tokenizer.eos_token), tokenizer.eos_token_id
    written = {end, tokenizer.decode([number])}  # "Ġthe" and " the"
    texts = [f"{before}{text}{after}" for text in written for before, after in (("", ""), ("a", "b"), ("a ", " b"))]
    if files.is_ordinary(end, path) or any(number in ids for ids in encode(tokenizer, texts)):
        raise files.TokenizerError(
            f"{path}: ordinary text can contain the end-of-document token {end!r} (id {number}), so crawled text could "
            "end a document; set eos_token in tokenizer_config.json to a special token (tokenizer.json lists them "
            "under added_tokens), or train a tokenizer with relora-mora train-tokenizer"
        )
