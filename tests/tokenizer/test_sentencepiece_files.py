"""Files next to a sentencepiece model: templates, added tokens, and how texts begin."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from relora_mora.tokenizer.files import MODEL_FILE, TokenizerError, open_sentencepiece
from relora_mora.tokenizer.identity import (
    save_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from relora_mora.tokenizer.load import encode, load_tokenizer


@pytest.mark.more
def test_a_chat_template_and_the_beginning_of_texts_go_with_a_sentencepiece_model(folder: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(folder)
    bos = tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    save_tokenizer(tokenizer, tmp_path / "saved")
    plain = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    conversation = [{"role": "user", "content": "the rank"}]
    [text] = encode(tokenizer, ["the rank"])
    assert plain.apply_chat_template(conversation)["input_ids"] == [bos, *text, tokenizer.eos_token_id]
    assert plain("the rank").input_ids == [bos, *text]
    again = load_tokenizer(tmp_path / "saved")
    assert again.chat_template == tokenizer.chat_template
    assert again("the rank").input_ids == [bos, *text]
    assert encode(again, ["a</s>b"]) == encode(tokenizer, ["a</s>b"])
    assert tokenizer.eos_token_id not in encode(again, ["a</s>b"])
    assert tokenizer_fingerprint(tmp_path / "saved") == tokenizer_fingerprint(folder)
    (tmp_path / "saved" / "chat_template.jinja").unlink()
    config = tmp_path / "saved" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "older"}))
    assert load_tokenizer(tmp_path / "saved").chat_template == "older"


def test_how_texts_begin_and_are_padded_goes_with_a_sentencepiece_model_without_tokenizer_json(
    folder: Path, tmp_path: Path
) -> None:
    """Folders of the first LLaMA models are so."""
    start = tmp_path / "start"
    start.mkdir()
    shutil.copy(folder / MODEL_FILE, start)
    described = {
        "add_bos_token": True,
        "add_eos_token": False,
        "pad_token": "<unk>",
        "padding_side": "left",
        "model_max_length": 4096,
    }
    (start / "tokenizer_config.json").write_text(json.dumps(described))
    save_tokenizer(start, tmp_path / "saved")
    for tokenizer in (load_tokenizer(start), AutoTokenizer.from_pretrained(str(tmp_path / "saved"))):
        [text] = encode(load_tokenizer(folder), ["the rank"])
        assert tokenizer("the rank").input_ids == [tokenizer.bos_token_id, *text]
        batch = tokenizer(["the rank of a matrix", "the"], padding=True)["input_ids"]
        assert batch[1][0] == tokenizer.pad_token_id == 0
        assert tokenizer.model_max_length == 4096


@pytest.mark.parametrize(
    ("file", "content"),
    [("chat_template.jinja", b"\xff\xfe"), ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Newer"}}')],
)
def test_unreadable_files_next_to_a_model_are_named(folder: Path, tmp_path: Path, file: str, content: bytes) -> None:
    shutil.copy(folder / MODEL_FILE, tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(TokenizerError, match=re.escape(str(tmp_path / file))):
        load_tokenizer(tmp_path)


def _special(token: str) -> dict[str, Any]:
    return {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False}


@pytest.fixture
def with_turns(folder: Path, tmp_path: Path) -> Path:
    """Tokens of ChatML next to a sentencepiece model, as saved before there was a tokenizer.json."""
    out = tmp_path / "with_turns"
    out.mkdir()
    shutil.copy(folder / MODEL_FILE, out)
    (out / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 1000, "<|im_start|>": 1001}))
    described = {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"2": _special("</s>"), "1001": _special("<|im_start|>")},
    }
    (out / "tokenizer_config.json").write_text(json.dumps(described))
    return out


def test_tokens_next_to_a_sentencepiece_model_are_added(with_turns: Path, folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(with_turns)
    assert (vocabulary_size(tokenizer), tokenizer.eos_token, tokenizer.eos_token_id) == (1002, "<|im_end|>", 1000)
    text = "<|im_start|>user\nhi  <|im_end|> "
    assert encode(tokenizer, [text])[0] == open_sentencepiece(folder / MODEL_FILE).encode(text), "no text has them"
    parsed = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
    assert parsed[0] == 1001 and 1000 in parsed, "what a chat template writes has"
    assert tokenizer_fingerprint(folder) != tokenizer_fingerprint(with_turns)
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert tokenizer_fingerprint(tmp_path / "saved") == tokenizer_fingerprint(with_turns)
    assert load_tokenizer(tmp_path / "saved").eos_token_id == 1000


@pytest.mark.parametrize(
    ("added", "eos", "message"),
    [
        ({"<x>": 1001}, "</s>", "'<x>' has the id 1001, which is not the next one"),
        ({"a": "b"}, "</s>", "its added tokens cannot be read"),
        ({"<x>": 1000}, "<end>", "eos_token in tokenizer_config.json is '<end>', which is not one of its tokens"),
    ],
)
def test_tokens_that_cannot_be_added_are_named(with_turns: Path, added: dict[str, Any], eos: str, message: str) -> None:
    (with_turns / "added_tokens.json").write_text(json.dumps(added))
    (with_turns / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eos}}))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(with_turns)
