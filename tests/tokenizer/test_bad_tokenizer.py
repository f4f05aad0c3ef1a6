"""Tokenizers that are refused: ambiguous ends of documents, other ids, and damaged files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from relora_mora.tokenizer import load as loading
from relora_mora.tokenizer.files import MODEL_FILE, TokenizerError
from relora_mora.tokenizer.load import load_tokenizer
from tests.tools.each import each
from tests.tools.tokenizer_tools import own_text, save_other_tokenizer


def test_a_tokenizer_that_finds_the_end_in_text_is_refused(tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "end": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="end").save_pretrained(str(tmp_path / "words"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="no end-of-document token"):
        load_tokenizer(tmp_path)
    json_file = tmp_path / "words" / "tokenizer.json"
    description = json.loads(json_file.read_text())
    description["added_tokens"][0]["special"] = False
    json_file.write_text(json.dumps(description))
    with pytest.raises(TokenizerError, match=r"text can contain the end-of-document token 'end' \(id 2\)"):
        load_tokenizer(tmp_path / "words")


END_IN_TEXT = ["\u010a", "\u0120the", "e", "he"]  # in the vocabulary, a newline and a space are written as letters


@each("token,listed", [*((token, listed) for token in END_IN_TEXT for listed in (False, True)), ("\u00c3", False)])
def test_an_end_that_is_a_piece_of_text_is_refused(tmp_path: Path, token: str, listed: bool) -> None:
    """``listed``: as an added token, which transformers makes of it when it saves the tokenizer."""
    path = save_other_tokenizer(tmp_path / "pieces", eos_token=token)
    if listed:
        PreTrainedTokenizerFast.from_pretrained(path).save_pretrained(path)
    with pytest.raises(TokenizerError, match=f"{path}: .* contain the end-of-document token '{token}'"):
        load_tokenizer(path)


@each("token", ["\u2581the", "<0x0A>"])
def test_an_end_that_is_a_piece_of_a_sentencepiece_model_is_refused(folder: Path, tmp_path: Path, token: str) -> None:
    shutil.copy(folder / MODEL_FILE, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    with pytest.raises(TokenizerError, match=f"text can contain the end-of-document token '{token}'"):
        load_tokenizer(tmp_path)


def test_a_conversion_with_other_ids_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loading.from_folder

    def broken(*args: Any, **kwargs: Any) -> Any:
        tokenizer = real(*args, **kwargs)
        tokenizer.backend_tokenizer.normalizer = None
        return tokenizer

    monkeypatch.setattr(loading, "from_folder", broken)
    with pytest.raises(TokenizerError, match=r"other tokens or ids than tokenizer\.model"):
        load_tokenizer(folder / MODEL_FILE)


@each(
    "name,content,message",
    [
        ("missing", None, "not found"),
        ("empty/", None, "this folder has no tokenizer"),
        ("words.txt", b"x", "not a sentencepiece .model file"),
        ("noise.model", b"no model", "not a sentencepiece model"),
        ("nothing.model", b"", "not a sentencepiece model"),
        *[("single/", content, "cannot load this tokenizer") for content in (b"[]", b"{", b"{}", bytes(range(256)))],
    ],
)
def test_what_is_not_a_tokenizer_is_explained(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    if content is not None:
        (path / "tokenizer.json" if path.is_dir() else path).write_bytes(content)
    with pytest.raises(TokenizerError, match=f"^{path}: .*{message}.*expected a folder with tokenizer.model"):
        load_tokenizer(path)


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(own_text()[0].splitlines()), model_prefix=str(tmp_path / "x"), vocab_size=320,
        model_type="bpe", byte_fallback=True, eos_id=-1, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    with pytest.raises(TokenizerError, match="no end-of-document token"):
        load_tokenizer(tmp_path / "x.model")
