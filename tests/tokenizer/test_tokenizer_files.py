"""Tokenizers that are refused, and files next to a sentencepiece model: which one decides, and what goes with it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import xxhash
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from relora_mora.tokenizer import load as loading
from relora_mora.tokenizer.files import MODEL_FILE, TokenizerError, open_sentencepiece
from relora_mora.tokenizer.identity import save_tokenizer, tokenizer_fingerprint, vocabulary_size
from relora_mora.tokenizer.load import encode, load_tokenizer
from tests.tools.each import each
from tests.tools.tokenizer_tools import own_text, save_other_tokenizer, train_tokenizer


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


# ---- files next to a model -------------------------------------------------------------------------------------------


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


@pytest.mark.more
def test_how_texts_begin_and_are_padded_goes_with_a_sentencepiece_model_without_tokenizer_json(tmp_path: Path) -> None:
    """Folders of the first LLaMA models are so."""
    start = tmp_path / "start"
    train_tokenizer(start, add_dummy_prefix=True)
    described = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,  # with which transformers would leave out the space before a text
        "add_bos_token": True,
        "add_eos_token": False,
        "pad_token": "<unk>",
        "padding_side": "left",
        "model_max_length": 4096,
    }
    (start / "tokenizer_config.json").write_text(json.dumps(described))
    save_tokenizer(start, tmp_path / "saved")
    for tokenizer in (load_tokenizer(start), AutoTokenizer.from_pretrained(str(tmp_path / "saved"))):
        text = open_sentencepiece(start / MODEL_FILE).encode("the rank")
        assert tokenizer("the rank").input_ids == [tokenizer.bos_token_id, *text]
        batch = tokenizer(["the rank of a matrix", "the"], padding=True)["input_ids"]
        assert batch[1][0] == tokenizer.pad_token_id == 0
        assert tokenizer.model_max_length == 4096


@each(
    "file,content",
    [
        ("added_tokens.json", {"<x>": 1000}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1000": {"content": "<x>", "special": True}}}),
        ("tokenizer_config.json", {"eos_token": "<x>"}),
        ("tokenizer_config.json", {"pad_token": "<x>"}),
    ],
)
def test_tokens_that_only_files_next_to_a_model_have_need_a_tokenizer_json(
    folder: Path, tmp_path: Path, file: str, content: dict[str, Any]
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    shutil.copy(folder / MODEL_FILE, given)
    settings = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (given / "tokenizer_config.json").write_text(json.dumps(settings))
    (given / file).write_text(json.dumps(settings | content if file == "tokenizer_config.json" else content))
    with pytest.raises(TokenizerError, match=r"other tokens or ids than tokenizer\.model") as caught:
        load_tokenizer(given)
    remedy = re.search(r"AutoTokenizer\.from_pretrained\('(.*)'\)\.save_pretrained\('(.*)'\)", str(caught.value))
    assert remedy is not None
    AutoTokenizer.from_pretrained(remedy[1]).save_pretrained(remedy[2])
    if "eos_token" not in content:
        assert vocabulary_size(load_tokenizer(given)) == 1001
        assert tokenizer_fingerprint(given) != tokenizer_fingerprint(folder)


def test_a_tokenizer_json_decides_next_to_a_model(folder: Path, tmp_path: Path) -> None:
    """If it gives the ids of the model, it is the same tokenizer."""
    saved, other = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("saved", "other"))
    of_model = xxhash.xxh64((folder / MODEL_FILE).read_bytes()).hexdigest()  # as in checkpoints of earlier releases
    assert tokenizer_fingerprint(saved) == tokenizer_fingerprint(folder / MODEL_FILE) == of_model
    described = json.loads((other / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(described))
    assert encode(load_tokenizer(other), ["THE"]) == encode(load_tokenizer(other), ["the"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(folder)
    save_tokenizer(other, tmp_path / "copy")
    assert not (tmp_path / "copy" / MODEL_FILE).exists(), "the model gives other ids"
    assert tokenizer_fingerprint(tmp_path / "copy") == tokenizer_fingerprint(other)
