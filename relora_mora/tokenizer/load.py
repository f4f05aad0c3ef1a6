"""Loads tokenizers so that they are exact and never parse special tokens in text."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    files.check_exists(path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = files.sentencepiece_file(path)
    reference = None if model is None else files.open_sentencepiece(model)
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as temporary:
        folder = path
        if path.is_file():
            folder = Path(temporary)
            shutil.copyfile(path, folder / files.MODEL_FILE)
        settings = {} if model is None else {"legacy": True}  # otherwise its spaces would differ from sentencepiece's
        # AutoTokenizer would choose a class by names in the folder, and some split text by rules of their own
        tokenizer = from_folder(PreTrainedTokenizerFast, folder, path, split_special_tokens=True, **settings)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(path)
    backend = tokenizer.backend_tokenizer  # these may have been on when it was saved
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    if reference is not None and not has_ids_of(tokenizer, reference):
        raise files.TokenizerError(
            f"{path}: it has other tokens or ids than {files.MODEL_FILE} with sentencepiece, because of other files or "
            f"an old transformers; with AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r}), "
            f"write the {files.DESCRIPTION} that is meant"
        )
    _check_end(tokenizer, path)
    return tokenizer  # type: ignore[no-any-return]


def from_folder(kind: Any, folder: Path, name: Path, **settings: Any) -> Any:
    """A tokenizer of one of transformers' classes.

    Raises :class:`TokenizerError`, whose message names ``name`` instead of the folder.
    """
    try:
        with quiet_transformers():
            tokenizer = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **settings)
    except Exception as error:  # transformers raises nearly any kind of error here
        reason = " ".join(str(error).split()).replace(str(folder), str(name))
        raise files.TokenizerError(
            f"{name}: transformers cannot load this tokenizer ({reason}); {files.EXPECTED}"
        ) from error
    # arguments of this call and names of code, which must not get into tokenizer_config.json
    for key in ("is_local", "local_files_only", "auto_map"):
        tokenizer.init_kwargs.pop(key, None)
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


def has_ids_of(tokenizer: "PreTrainedTokenizerBase", reference: "SentencePieceProcessor") -> bool:
    """Whether a tokenizer has the vocabulary of a sentencepiece model, and its ids of hard texts."""
    pieces = {reference.id_to_piece(number): number for number in range(reference.get_piece_size())}
    return tokenizer.get_vocab() == pieces and encode(tokenizer, HARD_TEXTS) == list(map(reference.encode, HARD_TEXTS))


def _check_end(tokenizer: "PreTrainedTokenizerBase", path: Path) -> None:
    """Raises :class:`TokenizerError` if there is no token that ends a document, or if text could have it."""
    end, number = str(tokenizer.eos_token), tokenizer.eos_token_id
    if number is None:
        raise files.TokenizerError(
            f"{path}: this tokenizer has no end-of-document token (eos); name one as eos_token in "
            "tokenizer_config.json, or train one with relora-mora train-tokenizer"
        )
    written = {end, tokenizer.decode([number])}  # "Ġthe" and " the"
    texts = [f"{before}{text}{after}" for text in written for before, after in (("", ""), ("a", "b"), ("a ", " b"))]
    if any(number in ids for ids in encode(tokenizer, [*texts, *HARD_TEXTS])):
        raise files.TokenizerError(
            f"{path}: ordinary text can contain the end-of-document token {end!r} (id {number}), so crawled text could "
            "end a document; set eos_token in tokenizer_config.json to a special token (tokenizer.json lists them "
            "under added_tokens), or train a tokenizer with relora-mora train-tokenizer"
        )
