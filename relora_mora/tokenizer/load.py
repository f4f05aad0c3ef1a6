"""Tokenizers as they are used here: exact, never parsing text for special tokens."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora_mora.tokenizer.folder import (
    EXPECTED,
    MODEL_FILE,
    TokenizerError,
    added_tokens,
    check_exists,
    is_ordinary,
    make_exact,
    open_sentencepiece,
    read_json,
    read_tokenizer,
    sentencepiece_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Where conversions of a sentencepiece model go wrong: spaces at either end, the names of special and byte tokens, bytes
# that no piece holds, whitespace that a normalizer would fold.
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


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder with ``tokenizer.model``, a ``.model`` file, or a Hugging Face tokenizer folder.

    Where a folder holds both ``tokenizer.model`` and a ``tokenizer.json`` with the same vocabulary, the model decides;
    with another vocabulary (added tokens), or other spaces behind special tokens, ``tokenizer.json`` does. Without one,
    added tokens are those of ``added_tokens.json`` and ``tokenizer_config.json``. Text is never parsed for special
    tokens, and dropout that a file asks for is off. Silent, and reads the disk alone. Sets
    ``TOKENIZERS_PARALLELISM=false`` unless it is set: here the worker processes are the parallelism.

    Raises :class:`TokenizerError` when there is none, it has no end-of-document token, text could have that token, or
    its ids differ from sentencepiece's.
    """
    path = Path(path)
    check_exists(path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = sentencepiece_file(path)
    with quiet_transformers():
        tokenizer = _from_folder(path) if model is None else _from_model(model, path)
        if model is not None and path.is_dir():
            _take_over(tokenizer, path, model)
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"{path}: this tokenizer has no end-of-document token (eos); {_eos_remedy(model)}")
    if model is not None:
        _check_ids(tokenizer, model)
    _check_end(tokenizer, path, model)
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without any special token: none is added and none is found in the text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if not texts:
            return []
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    backend.encode_special_tokens = True  # lost when a tokenizer is pickled, as for a worker process
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Nothing but errors from transformers' logger."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def auto_tokenizer(folder: Path, kind: Any = None, *, named: Path | None = None, **settings: Any) -> Any:
    """A tokenizer of transformers: what ``AutoTokenizer`` makes of a folder, or the class ``kind``.

    Raises :class:`TokenizerError`, which calls the folder ``named``.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = (kind or AutoTokenizer).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **settings
        )
    except Exception as error:  # transformers raises nearly any kind of error here
        name = named or folder
        said = " ".join(str(error).split()).replace(str(folder), str(name))
        raise TokenizerError(f"{name}: transformers cannot load this tokenizer ({said}); {EXPECTED}") from error
    # not to be written into tokenizer_config.json: arguments of this call, and names of code
    for key in ("is_local", "local_files_only", "auto_map"):
        tokenizer.init_kwargs.pop(key, None)
    if getattr(tokenizer, "legacy", None) is not None:  # a LlamaTokenizer is another one without it, and is saved so
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy  # type: ignore[attr-defined]
    return tokenizer


def _from_model(model: Path, given: Path) -> PreTrainedTokenizerBase:
    # alone in a folder: other files beside it would change the class
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        shutil.copyfile(model, Path(folder, MODEL_FILE))
        tokenizer = auto_tokenizer(Path(folder), named=given, split_special_tokens=True)
    tokenizer.name_or_path = str(given)
    tokenizer.init_kwargs["name_or_path"] = str(given)
    if getattr(tokenizer, "vocab_file", None):
        tokenizer.vocab_file = str(model)
    return tokenizer


def _take_over(tokenizer: PreTrainedTokenizerBase, folder: Path, model: Path) -> None:
    """What a model says nothing of, from the Hugging Face files beside it: added tokens, which of them ends a document,
    pads and begins texts, the chat template, and how texts are padded."""
    described = read_json(folder / "tokenizer_config.json") or {}
    _add_tokens(tokenizer, folder, model)
    _name_special(tokenizer, folder, described)
    template = folder / "chat_template.jinja"
    if template.is_file():
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{template}: is not UTF-8 ({error.reason}); convert it") from error
    else:
        given = described.get("chat_template")
        tokenizer.chat_template = given if isinstance(given, str) else None
    begins = _template_of_texts(tokenizer, folder, described)
    if begins is not None:
        tokenizer.backend_tokenizer.post_processor = begins  # type: ignore[attr-defined]


def _template_of_texts(tokenizer: PreTrainedTokenizerBase, folder: Path, described: Mapping[str, Any]) -> Any:
    """What adds special tokens to a text, as ``AutoTokenizer`` takes it from this folder; None: nothing."""
    from tokenizers import processors

    file = folder / "tokenizer.json"
    if file.is_file():
        return read_tokenizer(file).post_processor
    begin = tokenizer.bos_token if described.get("add_bos_token") is True else None
    end = tokenizer.eos_token if described.get("add_eos_token") is True else None
    if begin is None and end is None:
        return None
    around = [(str(token), tokenizer.convert_tokens_to_ids(str(token))) for token in (begin, end) if token is not None]
    return processors.TemplateProcessing(single=[*filter(None, (begin, "$A", end))], special_tokens=around)


def _add_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path, model: Path) -> None:
    from transformers import AddedToken

    for number, settings in added_tokens(folder, model).items():
        tokenizer.add_tokens([AddedToken(**{"normalized": False, **settings})])
        token = settings["content"]
        if tokenizer.convert_tokens_to_ids(token) != number:
            raise TokenizerError(
                f"{folder}: the token {token!r} has the id {number}, which is not the next one behind those of "
                f"{MODEL_FILE}; save the tokenizer again, with a tokenizer.json"
            )


def _name_special(tokenizer: PreTrainedTokenizerBase, folder: Path, described: Mapping[str, Any]) -> None:
    """Tokens that ``tokenizer_config.json`` names, by themselves or as settings of AddedToken, and how it pads."""
    for name in ("bos_token", "eos_token", "pad_token"):
        given = described.get(name)
        token = given.get("content") if isinstance(given, dict) else given
        if token in tokenizer.get_vocab():
            setattr(tokenizer, name, token)
        elif token is not None and name == "eos_token":
            raise TokenizerError(
                f"{folder}: eos_token in tokenizer_config.json is {token!r}, which is none of its tokens; correct it"
            )
    side, longest = described.get("padding_side"), described.get("model_max_length")
    kept: dict[str, Any] = {"padding_side": side} if side in ("left", "right") else {}
    kept |= {"model_max_length": longest} if isinstance(longest, int) else {}
    for name, value in kept.items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # these are written when it is saved


def _check_ids(tokenizer: PreTrainedTokenizerBase, model: Path) -> None:
    reference = open_sentencepiece(model)
    for text, ids in zip(HARD_TEXTS, encode(tokenizer, HARD_TEXTS), strict=True):
        if ids != reference.encode(text):
            raise TokenizerError(
                f"{model}: transformers converts this model to other ids than sentencepiece's, e.g. for {text!r}; "
                "update transformers, or train a tokenizer with tokenizer/train.py"
            )


def _from_folder(path: Path) -> PreTrainedTokenizerBase:
    """What ``tokenizer.json`` describes; without one, what ``AutoTokenizer`` makes of the other files.

    Of a ``tokenizer.json`` the classes of some models, such as Qwen2Tokenizer, take only the vocabulary, and split text
    by rules of their own. ``AutoTokenizer`` chooses a class by names in the folder.
    """
    from transformers import PreTrainedTokenizerFast

    described = (path / "tokenizer.json").is_file()
    if not described or "auto_map" in (read_json(path / "tokenizer_config.json") or {}):
        tokenizer = auto_tokenizer(path, split_special_tokens=True)  # refuses code of the folder
    if described:
        tokenizer = auto_tokenizer(path, PreTrainedTokenizerFast, split_special_tokens=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        make_exact(backend)
    return tokenizer


def _check_end(tokenizer: PreTrainedTokenizerBase, path: Path, model: Path | None) -> None:
    """Raises :class:`TokenizerError` if text could have the token that ends a document."""
    end, number = str(tokenizer.eos_token), tokenizer.eos_token_id
    written = {end, tokenizer.decode([number])}  # "Ġthe" and " the"
    texts = [f"{before}{text}{after}" for text in written for before, after in (("", ""), ("a", "b"), ("a ", " b"))]
    if is_ordinary(end, path, model) or any(number in ids for ids in encode(tokenizer, texts)):
        raise TokenizerError(
            f"{path}: the end-of-document token {end!r} (id {number}) is one that text can have, so crawled text could "
            "end a document; name a special token as eos_token in tokenizer_config.json (tokenizer.json lists these "
            "under added_tokens), or train a tokenizer with tokenizer/train.py"
        )


def _eos_remedy(model: Path | None) -> str:
    if model is not None:
        return "train the sentencepiece model with an eos_id, as tokenizer/train.py does"
    return "name one as eos_token in tokenizer_config.json"
