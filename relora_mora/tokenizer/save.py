"""Tokenizers for others: a folder that plain transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from relora_mora.tokenizer.folder import MODEL_FILE, TokenizerError, read_json, sentencepiece_file
from relora_mora.tokenizer.load import HARD_TEXTS, auto_tokenizer, encode, load_tokenizer, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    model = sentencepiece_file(Path(tokenizer.name_or_path)) if Path(tokenizer.name_or_path).exists() else None
    out.mkdir(parents=True, exist_ok=True)
    try:
        with quiet_transformers():
            _save(tokenizer, out)
            if model is not None and model.resolve() != (out / MODEL_FILE).resolve():
                # of a full disk, copyfile would name the file that it read
                (out / MODEL_FILE).write_bytes(model.read_bytes())
            saved = auto_tokenizer(out)
        written = [saved.encode(text, add_special_tokens=False, split_special_tokens=True) for text in HARD_TEXTS]
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # what values of another kind end in
        said = " ".join(str(error).split()).replace(str(out), tokenizer.name_or_path)
        raise TokenizerError(
            f"{tokenizer.name_or_path}: transformers cannot save it ({said}); fix its tokenizer_config.json"
        ) from error
    if written != encode(tokenizer, HARD_TEXTS) or saved.eos_token_id != tokenizer.eos_token_id:
        beside, remedy = "", "report this with the tokenizer"
        kind = (read_json(out / "config.json") or {}).get("model_type")
        if kind is not None:
            beside, remedy = f" next to a model of type {kind}", "use a tokenizer of that kind of model"
        raise TokenizerError(
            f"{tokenizer.name_or_path}: when it is saved{beside}, transformers reads it with other ids; {remedy}"
        )


def _save(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    splits = tokenizer.split_special_tokens
    try:
        tokenizer.split_special_tokens = tokenizer.chat_template is None
        tokenizer.save_pretrained(str(out))
    finally:
        tokenizer.split_special_tokens = splits
    _name_for_older_readers(out / "tokenizer_config.json")


def _name_for_older_readers(path: Path) -> None:
    """Puts names that transformers 4, and what builds on it, knows in place of two that only transformers 5 knows."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
