"""Loads tokenizers so that they are exact and never parse special tokens in text."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora_mora.tokenizer import files

if TYPE_CHECKING:
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

    If a folder has both ``tokenizer.model`` and ``tokenizer.json``, the model decides the ids, unless
    ``tokenizer.json`` has another vocabulary (added tokens) or treats spaces after special tokens differently; then
    ``tokenizer.json`` decides. Without ``tokenizer.json``, added tokens come from ``added_tokens.json`` and
    ``tokenizer_config.json``. Special tokens are never parsed in text, and dropout is turned off. Prints nothing and
    reads only the disk. Sets ``TOKENIZERS_PARALLELISM=false`` unless it is set, because worker processes already run in
    parallel.

    Raises :class:`TokenizerError` if no tokenizer is found, it has no end-of-document token, text could have that
    token, or its ids differ from sentencepiece's.
    """
    path = Path(path)
    files.check_exists(path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = files.sentencepiece_file(path)
    with quiet_transformers():
        tokenizer = _from_folder(path) if model is None else _from_model(model, path)
        if model is not None and path.is_dir():
            _apply_hugging_face_files(tokenizer, path, model)
    if tokenizer.eos_token_id is None:
        remedy = "name one as eos_token in tokenizer_config.json"
        if model is not None:
            remedy = "train the sentencepiece model with an eos_id, as relora-mora train-tokenizer does"
        raise files.TokenizerError(f"{path}: this tokenizer has no end-of-document token (eos); {remedy}")
    if model is not None:
        _check_ids(tokenizer, model)
    _check_end(tokenizer, path, model)
    return tokenizer


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens: none is added, and none is parsed in the text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if not texts:
            return []
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
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
    if getattr(tokenizer, "legacy", None) is not None:  # LlamaTokenizer gives other ids without it, so it must be saved
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy  # type: ignore[attr-defined]
    return tokenizer


def _from_model(model: Path, path: Path) -> "PreTrainedTokenizerBase":
    # in a folder of its own, because other files next to it would change the class
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        shutil.copyfile(model, Path(folder, files.MODEL_FILE))
        tokenizer = auto_tokenizer(Path(folder), named=path, split_special_tokens=True)
    tokenizer.name_or_path = str(path)
    tokenizer.init_kwargs["name_or_path"] = str(path)
    if getattr(tokenizer, "vocab_file", None):
        tokenizer.vocab_file = str(model)
    return tokenizer


def _apply_hugging_face_files(tokenizer: "PreTrainedTokenizerBase", folder: Path, model: Path) -> None:
    """Adds what Hugging Face files next to a sentencepiece model define.

    These are added tokens, the tokens for the end of a document, padding and the beginning of texts, the chat template,
    and how texts are padded.
    """
    described = files.read_json(folder / "tokenizer_config.json") or {}
    _add_tokens(tokenizer, folder, model)
    _name_special(tokenizer, folder, described)
    template = folder / "chat_template.jinja"
    if template.is_file():
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise files.TokenizerError(f"{template}: not UTF-8 ({error.reason}); convert it") from error
    else:
        chat_template = described.get("chat_template")
        tokenizer.chat_template = chat_template if isinstance(chat_template, str) else None
    processor = _post_processor(tokenizer, folder, described)
    if processor is not None:
        tokenizer.backend_tokenizer.post_processor = processor  # type: ignore[attr-defined]


def _post_processor(tokenizer: "PreTrainedTokenizerBase", folder: Path, described: Mapping[str, Any]) -> Any:
    """The post-processor that adds special tokens to a text, as ``AutoTokenizer`` would set it; None if none does."""
    from tokenizers import processors

    file = folder / "tokenizer.json"
    if file.is_file():
        return files.read_tokenizer(file).post_processor
    begin = tokenizer.bos_token if described.get("add_bos_token") is True else None
    end = tokenizer.eos_token if described.get("add_eos_token") is True else None
    if begin is None and end is None:
        return None
    around = [(str(token), tokenizer.convert_tokens_to_ids(str(token))) for token in (begin, end) if token is not None]
    return processors.TemplateProcessing(single=[*filter(None, (begin, "$A", end))], special_tokens=around)


def _add_tokens(tokenizer: "PreTrainedTokenizerBase", folder: Path, model: Path) -> None:
    from transformers import AddedToken

    for number, settings in files.added_tokens(folder, model).items():
        tokenizer.add_tokens([AddedToken(**{"normalized": False, **settings})])
        token = settings["content"]
        if tokenizer.convert_tokens_to_ids(token) != number:
            raise files.TokenizerError(
                f"{folder}: the token {token!r} has the id {number}, which is not the next one after those of "
                f"{files.MODEL_FILE}; save the tokenizer again, with a tokenizer.json"
            )


def _name_special(tokenizer: "PreTrainedTokenizerBase", folder: Path, described: Mapping[str, Any]) -> None:
    """Sets the special tokens and padding from ``tokenizer_config.json``, in which a token is text or an AddedToken."""
    for name in ("bos_token", "eos_token", "pad_token"):
        entry = described.get(name)
        token = entry.get("content") if isinstance(entry, dict) else entry
        if token in tokenizer.get_vocab():
            setattr(tokenizer, name, token)
        elif token is not None and name == "eos_token":
            raise files.TokenizerError(
                f"{folder}: eos_token in tokenizer_config.json is {token!r}, which is not one of its tokens; correct it"
            )
    side, longest = described.get("padding_side"), described.get("model_max_length")
    kept: dict[str, Any] = {"padding_side": side} if side in ("left", "right") else {}
    kept |= {"model_max_length": longest} if isinstance(longest, int) else {}
    for name, value in kept.items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # saved with the tokenizer


def _check_ids(tokenizer: "PreTrainedTokenizerBase", model: Path) -> None:
    reference = files.open_sentencepiece(model)
    for text, ids in zip(HARD_TEXTS, encode(tokenizer, HARD_TEXTS), strict=True):
        if ids != reference.encode(text):
            raise files.TokenizerError(
                f"{model}: with transformers this model gives other ids than with sentencepiece, e.g. for {text!r}; "
                "update transformers, or train a tokenizer with relora-mora train-tokenizer"
            )


def _from_folder(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in ``tokenizer.json``, or what ``AutoTokenizer`` loads if that file is missing.

    ``AutoTokenizer`` chooses a class by names in the folder. Some classes, such as Qwen2Tokenizer, use only the
    vocabulary of ``tokenizer.json``, and split text by rules of their own.
    """
    from transformers import PreTrainedTokenizerFast

    described = (path / "tokenizer.json").is_file()
    if not described or "auto_map" in (files.read_json(path / "tokenizer_config.json") or {}):
        tokenizer = auto_tokenizer(path, split_special_tokens=True)  # refuses code from the folder
    if described:
        tokenizer = auto_tokenizer(path, PreTrainedTokenizerFast, split_special_tokens=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        files.make_exact(backend)
    return tokenizer


def _check_end(tokenizer: "PreTrainedTokenizerBase", path: Path, model: Path | None) -> None:
    """Raises :class:`TokenizerError` if text could have the token that ends a document."""
    end, number = str(tokenizer.eos_token), tokenizer.eos_token_id
    written = {end, tokenizer.decode([number])}  # "Ġthe" and " the"
    texts = [f"{before}{text}{after}" for text in written for before, after in (("", ""), ("a", "b"), ("a ", " b"))]
    if files.is_ordinary(end, path, model) or any(number in ids for ids in encode(tokenizer, texts)):
        raise files.TokenizerError(
            f"{path}: ordinary text can contain the end-of-document token {end!r} (id {number}), so crawled text could "
            "end a document; set eos_token in tokenizer_config.json to a special token (tokenizer.json lists them "
            "under added_tokens), or train a tokenizer with relora-mora train-tokenizer"
        )
