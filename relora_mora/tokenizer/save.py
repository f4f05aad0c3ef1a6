"""Saves a tokenizer as a folder that plain transformers can load."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from relora_mora.tokenizer.folder import MODEL_FILE, TokenizerError, read_json, sentencepiece_file
from relora_mora.tokenizer.load import HARD_TEXTS, auto_tokenizer, encode, load_tokenizer, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_tokenizer(tokenizer: "str | Path | PreTrainedTokenizerBase", out: str | Path) -> None:
    """Writes a folder from which plain ``AutoTokenizer.from_pretrained(out)`` gives the same ids.

    ``tokenizer.model`` is copied, too. If there is a chat template, which writes special tokens as text, plain
    transformers will parse them in text again. ``tokenizer`` is a path as for :func:`load_tokenizer`, or its result.
    ``out`` may already hold a model with its ``config.json``. Raises :class:`TokenizerError` if transformers refuses to
    write the folder, or the folder gives other ids.
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
                # not copyfile, whose error for a full disk names the file that it reads
                (out / MODEL_FILE).write_bytes(model.read_bytes())
            saved = auto_tokenizer(out)
        written = [saved.encode(text, add_special_tokens=False, split_special_tokens=True) for text in HARD_TEXTS]
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # transformers' errors for values of a wrong type
        reason = " ".join(str(error).split()).replace(str(out), tokenizer.name_or_path)
        raise TokenizerError(
            f"{tokenizer.name_or_path}: transformers cannot save it ({reason}); fix its tokenizer_config.json"
        ) from error
    if written != encode(tokenizer, HARD_TEXTS) or saved.eos_token_id != tokenizer.eos_token_id:
        context, remedy = "", "report this with the tokenizer"
        kind = (read_json(out / "config.json") or {}).get("model_type")
        if kind is not None:
            context, remedy = f" next to a model of type {kind}", "use a tokenizer for that type of model"
        raise TokenizerError(f"{tokenizer.name_or_path}: saved{context}, transformers gives other ids for it; {remedy}")


def _save(tokenizer: "PreTrainedTokenizerBase", out: Path) -> None:
    splits = tokenizer.split_special_tokens
    try:
        tokenizer.split_special_tokens = tokenizer.chat_template is None
        tokenizer.save_pretrained(str(out))
    finally:
        tokenizer.split_special_tokens = splits
    # replace two names that only transformers 5 knows by those of transformers 4, which other tools know
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
