"""The tokenizer: loaded exactly, never parsing text for special tokens.

A ``tokenizer.model`` of sentencepiece can be wrapped for transformers in several ways, most of them subtly wrong: as a
``LlamaTokenizer`` it loses a leading space and takes a crawled ``</s>`` for the end of a document. What is right here
is a folder that holds nothing but the model, loaded with ``split_special_tokens=True``; every load compares its ids
with sentencepiece's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

MODEL_FILE = "tokenizer.model"
_EXPECTED = "expected a folder with tokenizer.model, a sentencepiece .model file, or a Hugging Face tokenizer folder"
_OF_NO_ID = ("version", "truncation", "padding", "post_processor", "decoder")  # they change no id of a text
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")

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
    "The quick brown fox, it's said, \"jumps\" over 13 lazy dogs — doesn't it?",
)


class TokenizerError(ValueError):
    """A tokenizer that cannot be used: what was given, what was expected, the remedy."""

    same_on_all_ranks = True


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder with ``tokenizer.model``, a ``.model`` file, or a Hugging Face tokenizer folder.

    Where a folder holds both ``tokenizer.model`` and a ``tokenizer.json`` with the same vocabulary, the model decides;
    with another vocabulary (added tokens) ``tokenizer.json`` does. Text is never parsed for special tokens. Silent, and
    reads the disk alone. Sets ``TOKENIZERS_PARALLELISM=false`` unless it is set: here the worker processes are the
    parallelism.

    Raises :class:`TokenizerError` when there is none, it has no end-of-document token, it would find that token in
    text, or its ids differ from sentencepiece's.
    """
    path = Path(path)
    _check_exists(path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = _sentencepiece_file(path)
    with quiet_transformers():
        tokenizer = _from_folder(path) if model is None else _from_model(model, path)
        if model is not None and path.is_dir():
            _take_over(tokenizer, path)
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"{path}: this tokenizer has no end-of-document token (eos); {_eos_remedy(model)}")
    if model is not None:
        _check_ids(tokenizer, model)
    text = str(tokenizer.eos_token)
    if tokenizer.eos_token_id in encode(tokenizer, [f"a {text} b"])[0]:
        raise TokenizerError(
            f"{path}: this tokenizer reads the text {text!r} as the end of a document (id {tokenizer.eos_token_id}), "
            "so crawled text could end one; mark that token as special in tokenizer.json, or train a tokenizer with "
            "tokenizer/train.py"
        )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer in a folder."""
    return any((folder / name).is_file() for name in (MODEL_FILE, *_VOCABULARY_FILES))


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without any special token: none is added and none is found in the text.

    Lone surrogates, which no UTF-8 text can hold, count as U+FFFD.
    """
    texts = [_utf8(text) for text in texts]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if not texts:
            return []
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    backend.encode_special_tokens = True  # lost when a tokenizer is pickled, as for a worker process
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id plus one: rows that a model's embedding needs. ``len(tokenizer)`` misses gaps in the ids."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size_of_model: int, *, trained: bool = True
) -> str | None:
    """Raises :class:`TokenizerError` when ids do not fit the model; a remark when much of the model is unused.

    ``trained``: the model has weights already, so that its vocabulary is what it is.
    """
    size = vocabulary_size(tokenizer)
    name = tokenizer.name_or_path or "the tokenizer"
    if size > vocab_size_of_model:
        remedy = f"set --model.overrides='{{vocab_size: {size}}}', or use a smaller tokenizer"
        if trained:
            remedy = "take the tokenizer that the model was trained with"
        raise TokenizerError(
            f"{name}: {size} token ids, but the model has only {vocab_size_of_model} (vocab_size); {remedy}"
        )
    unused = vocab_size_of_model - size
    if unused >= max(1024, size // 20):
        return (
            f"the model has {vocab_size_of_model} embeddings, {unused} of them never used: "
            f"{name} has only {size} token ids"
        )
    return None


def tokenizer_fingerprint(path: str | Path, loaded: PreTrainedTokenizerBase | None = None) -> str:
    """16 hex digits over what decides the ids, the same for a folder and for the ``tokenizer.model`` in it.

    It is of the tokenizer as it is loaded: ``tokenizer.json`` can be written in several ways, and transformers rewrites
    parts of some. ``loaded`` is what :func:`load_tokenizer` gave for the path, where that was called already. Raises
    :class:`TokenizerError` as it does.
    """
    path = Path(path)
    _check_exists(path)
    model = _sentencepiece_file(path)
    if model is not None:
        return xxhash.xxh64(model.read_bytes()).hexdigest()
    tokenizer = load_tokenizer(path) if loaded is None else loaded
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any
    if backend is None:
        content = sorted(tokenizer.get_vocab().items())
    else:
        content = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _OF_NO_ID}
    return xxhash.xxh64(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_tokenizer(path: str | Path, fingerprint: str) -> bool:
    """Whether there is a tokenizer at a path that can be loaded and has this fingerprint."""
    try:
        return tokenizer_fingerprint(path, load_tokenizer(path)) == fingerprint
    except (ValueError, OSError):
        return False


def save_tokenizer(tokenizer: str | Path | PreTrainedTokenizerBase, out: str | Path) -> None:
    """Writes a folder whose ids plain ``AutoTokenizer.from_pretrained(out)`` reproduces; ``tokenizer.model`` included.

    With a chat template, which writes special tokens as text, plain transformers will find these in text again.
    ``tokenizer`` is a path as for :func:`load_tokenizer`, or what it returned. ``out`` may already hold a model with
    its ``config.json``. Raises :class:`TokenizerError` when transformers refuses to write it, or the folder gives other
    ids.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    out = Path(out)
    model = _sentencepiece_file(Path(tokenizer.name_or_path)) if Path(tokenizer.name_or_path).exists() else None
    out.mkdir(parents=True, exist_ok=True)
    try:
        with quiet_transformers():
            _save(tokenizer, out)
            if model is not None and model.resolve() != (out / MODEL_FILE).resolve():
                # of a full disk, copyfile would name the file that it read
                (out / MODEL_FILE).write_bytes(model.read_bytes())
            saved = _auto(out)
        written = [saved.encode(text, add_special_tokens=False, split_special_tokens=True) for text in HARD_TEXTS]
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # what values of another kind end in
        said = " ".join(str(error).split())
        raise TokenizerError(
            f"{tokenizer.name_or_path}: transformers cannot save it ({said}); mend its tokenizer_config.json"
        ) from error
    if written != encode(tokenizer, HARD_TEXTS) or saved.eos_token_id != tokenizer.eos_token_id:
        raise TokenizerError(
            f"{out}: the saved tokenizer gives other ids than {tokenizer.name_or_path}; report this with the tokenizer"
        )


def _save(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    splits = tokenizer.split_special_tokens
    try:
        tokenizer.split_special_tokens = tokenizer.chat_template is None
        tokenizer.save_pretrained(str(out))
    finally:
        tokenizer.split_special_tokens = splits


def open_sentencepiece(path: str | Path) -> SentencePieceProcessor:
    """sentencepiece's own tokenizer of a ``.model`` file; raises :class:`TokenizerError` when it is none."""
    processor = _processor(Path(path))
    if processor is None:
        raise TokenizerError(f"{path}: this is not a sentencepiece model; {_EXPECTED}")
    return processor


def _check_exists(path: Path) -> None:
    if path.is_dir():
        if not has_tokenizer(path):
            raise TokenizerError(f"{path}: no tokenizer in this folder; {_EXPECTED}; tokenizer/train.py trains one")
    elif not path.exists():
        raise TokenizerError(
            f"{path}: not found; {_EXPECTED}; tokenizer/train.py trains one, "
            "`hf download REPO --local-dir DIR` fetches one"
        )
    elif path.suffix != ".model":
        raise TokenizerError(f"{path}: a file of another kind; {_EXPECTED}")


def _sentencepiece_file(path: Path) -> Path | None:
    """The sentencepiece model that decides the ids; None: the Hugging Face files of the folder do."""
    if path.is_file():
        open_sentencepiece(path)
        return path
    model = path / MODEL_FILE
    if not model.is_file():
        return None
    described = _read_json(path / "tokenizer.json")
    if described is None:
        open_sentencepiece(model)
        return model
    processor = _processor(model)
    if processor is None:  # a tiktoken file of that name, as with Llama 3
        return None
    pieces = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    return model if _names(described, path) == pieces else None


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


def _from_model(model: Path, given: Path) -> PreTrainedTokenizerBase:
    # alone in a folder: other files beside it would change the class
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        shutil.copyfile(model, Path(folder, MODEL_FILE))
        tokenizer = _auto(Path(folder), split_special_tokens=True)
    tokenizer.name_or_path = str(given)
    tokenizer.init_kwargs["name_or_path"] = str(given)
    if getattr(tokenizer, "vocab_file", None):
        tokenizer.vocab_file = str(model)
    return tokenizer


def _take_over(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What a model says nothing of, from the Hugging Face files beside it: the chat template, and how texts begin."""
    template = folder / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    else:
        described = (_read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
        tokenizer.chat_template = described if isinstance(described, str) else None
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        begins = Tokenizer.from_file(str(folder / "tokenizer.json")).post_processor
        if begins is not None:
            tokenizer.backend_tokenizer.post_processor = begins  # type: ignore[attr-defined]


def _check_ids(tokenizer: PreTrainedTokenizerBase, model: Path) -> None:
    reference = open_sentencepiece(model)
    for text, ids in zip(HARD_TEXTS, encode(tokenizer, HARD_TEXTS), strict=True):
        if ids != reference.encode(text):
            raise TokenizerError(
                f"{model}: transformers converts this model to other ids than sentencepiece's, e.g. for {text!r}; "
                "update transformers, or train a tokenizer with tokenizer/train.py"
            )


def _from_folder(path: Path) -> PreTrainedTokenizerBase:
    tokenizer = _auto(path, split_special_tokens=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # settings of whoever saved it; documents are neither cut nor padded
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def _auto(folder: Path, **settings: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **settings
        )
    except Exception as error:  # transformers raises nearly any kind of error here
        raise TokenizerError(
            f"{folder}: transformers cannot load this tokenizer ({' '.join(str(error).split())}); {_EXPECTED}"
        ) from error
    # not to be written into tokenizer_config.json: arguments of this call, and names of code
    for key in ("is_local", "local_files_only", "auto_map"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _eos_remedy(model: Path | None) -> str:
    if model is not None:
        return "train the sentencepiece model with an eos_id, as tokenizer/train.py does"
    return "name one as eos_token in tokenizer_config.json"


def _read_json(path: Path) -> dict[str, Any] | None:
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


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


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
