"""The tokenizer is exact: sentencepiece's ids on every way in and out, and nothing in a text is a special token."""

import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig

from relora_mora.tokenizer.files import MODEL_FILE, TokenizerError, open_sentencepiece
from relora_mora.tokenizer.identity import (
    check_vocabulary,
    gives_same_tokens,
    save_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from relora_mora.tokenizer.load import HARD_TEXTS, encode, load_tokenizer
from tests.tools.each import each
from tests.tools.shared import SHARED
from tests.tools.tokenizer_tools import save_other_tokenizer, train_tokenizer


def _plain(folder: Path, texts: list[str]) -> list[list[int]]:
    """Ids as a user of the exported folder gets them, without arguments about special tokens."""
    return AutoTokenizer.from_pretrained(str(folder))(texts)["input_ids"]


@pytest.mark.more
def test_texts_are_exact_on_every_path(folder: Path, tmp_path: Path) -> None:
    texts = [*HARD_TEXTS, *(text + other for text in HARD_TEXTS for other in HARD_TEXTS), "".join(HARD_TEXTS)]
    for shard in sorted((SHARED / "data/c4like/train").glob("*.json.gz"))[:1]:
        with gzip.open(shard, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines][:100]
    reference = open_sentencepiece(folder / MODEL_FILE).encode(texts)
    LlamaConfig().save_pretrained(str(tmp_path / "export"))  # its model_type must not decide the tokenizer's class
    save_tokenizer(folder, tmp_path / "export")
    for path in (folder, folder / MODEL_FILE, tmp_path / "export"):
        assert encode(load_tokenizer(path), texts) == reference
    for path in (folder, tmp_path / "export"):
        assert _plain(path, texts) == reference
        assert AutoTokenizer.from_pretrained(str(path)).batch_decode(reference) == [
            text.replace("\u2581", " ") for text in texts
        ]
    assert not any(special in ids for ids in reference for special in (0, 1, 2))
    tokenizer = load_tokenizer(folder)
    for text, ids in zip(texts, reference, strict=True):  # parts of a text decode to its parts
        halves = "".join(tokenizer.decode(part) for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]))
        assert halves == text.replace("\u2581", " ") or "\ufffd" in halves


def test_no_text_ends_a_document(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for loaded in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):  # as it reaches a worker process
        ids = encode(loaded, ["</s>", "a</s>", "<s> </s> <unk>"])
        assert all(special not in found for found in ids for special in (0, 1, 2))
    assert encode(tokenizer, []) == []


def test_the_same_tokens_are_known_in_another_form(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(folder, tmp_path / "export")
    (tmp_path / "export" / MODEL_FILE).unlink()
    assert tokenizer_fingerprint(tmp_path / "export") != tokenizer_fingerprint(folder)
    for path in (folder, folder / MODEL_FILE):
        assert gives_same_tokens(path, tmp_path / "export")
        assert gives_same_tokens(tmp_path / "export", path)
    assert not gives_same_tokens(folder, _hugging_face(folder, tmp_path / "hf"))


def _hugging_face(folder: Path, out: Path, **changes: Any) -> Path:
    """A Hugging Face folder without tokenizer.model, with added tokens, truncation and padding left on."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "pad_token": "<|pad|>"})
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=4)
    tokenizer.save_pretrained(str(out))
    description = json.loads((out / "tokenizer.json").read_text())
    description.update(changes)
    (out / "tokenizer.json").write_text(json.dumps(description))
    return out


def test_a_hugging_face_folder(folder: Path, tmp_path: Path) -> None:
    path = _hugging_face(folder, tmp_path / "hf")
    tokenizer = load_tokenizer(path)
    text = "a longer text </s> with <|end|> and <|pad|> in it"
    assert tokenizer.eos_token_id == 1000
    assert encode(tokenizer, [text]) == open_sentencepiece(folder / MODEL_FILE).encode([text])
    assert vocabulary_size(tokenizer) == 1002
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    older = model | {"merges": [" ".join(pair) for pair in model["merges"]]}
    fewer = model | {"merges": model["merges"][:-1]}
    for changes, is_same in (
        ({"truncation": None, "padding": None}, True),
        ({"model": older}, True),
        ({"model": {key: value for key, value in model.items() if key != "ignore_merges"}}, True),
        ({"model": fewer}, False),
    ):
        other = _hugging_face(folder, tmp_path / "other", **changes)
        assert (tokenizer_fingerprint(other) == tokenizer_fingerprint(path)) == is_same
    assert tokenizer_fingerprint(path) != tokenizer_fingerprint(folder)
    shutil.copy(folder / MODEL_FILE, path / MODEL_FILE)  # without the added tokens: tokenizer.json decides
    assert load_tokenizer(path).eos_token_id == 1000
    save_tokenizer(path, tmp_path / "export")
    assert _plain(tmp_path / "export", [text]) == encode(tokenizer, [text])


@each("legacy", [True, False])
def test_a_tokenizer_of_llama_is_saved_as_it_is(folder: Path, tmp_path: Path, legacy: bool) -> None:
    """transformers leaves ``legacy`` out, without which the class builds another one."""
    path = _hugging_face(folder, tmp_path / "hf")
    file = path / "tokenizer_config.json"
    described = json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    file.write_text(json.dumps(described))
    save_tokenizer(path, tmp_path / "export")
    assert tokenizer_fingerprint(path) == tokenizer_fingerprint(tmp_path / "export")


def test_code_of_a_tokenizer_is_neither_run_nor_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    path = _hugging_face(folder, tmp_path / "hf")
    mark = tmp_path / "it was run"
    (path / "foreign_code.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    )
    config = json.loads((path / "tokenizer_config.json").read_text())
    code = {"auto_map": {"AutoTokenizer": [None, "foreign_code.Own"]}, "trust_remote_code": True}
    (path / "tokenizer_config.json").write_text(json.dumps(config | code))
    save_tokenizer(path, tmp_path / "out")
    assert not [
        file.name for file in (tmp_path / "out").iterdir() if file.suffix == ".py" or "foreign_code" in file.read_text()
    ]
    (path / "tokenizer_config.json").write_text(json.dumps(config | code | {"tokenizer_class": "Own"}))
    load_tokenizer(path)
    assert not mark.exists()


@each(
    "wrong",
    [
        {"chat_template": [{"name": "../../x", "template": ""}]},
        {"chat_template": [{"name": 3, "template": 4}]},
        {"model_max_length": "x"},
    ],
)
def test_a_tokenizer_that_cannot_be_saved_is_named(folder: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = _hugging_face(folder, tmp_path / "hf")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(TokenizerError, match="fix its tokenizer_config") as caught:
        save_tokenizer(path, tmp_path / "out")
    assert str(caught.value).startswith(f"{path}: ")
    assert sorted(name.name for name in tmp_path.iterdir()) == ["hf", "out"]


def test_turns_of_a_newer_llama_are_tokenized_as_by_transformers(tmp_path: Path) -> None:
    """Its tokenizer.json adds no space after a special token, and has the vocabulary of the model next to it."""
    given, saved, out = (tmp_path / name for name in ("given", "saved", "out"))
    train_tokenizer(given, add_dummy_prefix=True, control_symbols=["[INST]", "[/INST]"])
    tokens = {str(at): {"content": token, "special": True} for at, token in enumerate(("<unk>", "<s>", "</s>"))}
    tokens |= {"3": {"content": "[INST]", "special": True}, "4": {"content": "[/INST]", "special": True}}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "added_tokens_decoder": tokens}
    settings |= {"chat_template": "{{ messages }}"}
    (given / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "</s>", "bos_token": "<s>"}))
    AutoTokenizer.from_pretrained(given).save_pretrained(saved)
    shutil.copy(given / MODEL_FILE, saved / MODEL_FILE)
    turns = "<s>[INST] a word[/INST] another</s>[INST]one[/INST]\nmore"
    expected = AutoTokenizer.from_pretrained(saved)(turns, add_special_tokens=False)["input_ids"]
    tokenizer = load_tokenizer(saved)
    save_tokenizer(tokenizer, out)
    tokenizer.backend_tokenizer.encode_special_tokens = False
    assert tokenizer.backend_tokenizer.encode(turns, add_special_tokens=False).ids == expected
    assert AutoTokenizer.from_pretrained(out)(turns, add_special_tokens=False)["input_ids"] == expected


def _as_described(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of what a tokenizer.json says, by the package that wrote it."""
    described = Tokenizer.from_file(str(folder / "tokenizer.json"))
    described.encode_special_tokens = True
    return [encoding.ids for encoding in described.encode_batch(texts, add_special_tokens=False)]


@each("model_type", [None, "llama", "mistral", "qwen2", "qwen3"])
@each("name", [None, "PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer"])
def test_a_tokenizer_json_decides_next_to_any_model(tmp_path: Path, model_type: str | None, name: str | None) -> None:
    path = save_other_tokenizer(tmp_path / "given", **({} if name is None else {"tokenizer_class": name}))
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert encode(load_tokenizer(path), HARD_TEXTS) == _as_described(path, HARD_TEXTS)
    save_tokenizer(path, tmp_path / "saved")
    assert _plain(tmp_path / "saved", ["1000 cafe\u0301"]) == _as_described(path, ["1000 cafe\u0301"])
    assert tokenizer_fingerprint(tmp_path / "saved") == tokenizer_fingerprint(path)


def test_files_that_transformers_would_read_differently_are_not_saved(tmp_path: Path) -> None:
    path, out = save_other_tokenizer(tmp_path / "given"), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(TokenizerError, match="gives other ids for it once it is saved; next to a model") as caught:
        save_tokenizer(path, out)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(out) not in str(caught.value)


def test_dropout_of_merges_is_switched_off(tmp_path: Path) -> None:
    path = save_other_tokenizer(tmp_path / "given")
    expected, fingerprint = _as_described(path, ["1000 the"]), tokenizer_fingerprint(path)
    described = json.loads((path / "tokenizer.json").read_text())
    described["model"]["dropout"] = 0.5
    (path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = load_tokenizer(path)
    assert all(encode(tokenizer, ["1000 the"]) == expected for _ in range(50))
    assert tokenizer_fingerprint(path) == fingerprint
    save_tokenizer(path, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer.json").read_text())["model"]["dropout"] is None


def test_vocabulary_against_the_model(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert vocabulary_size(tokenizer) == 1000
    check_vocabulary(tokenizer, 1000)
    with pytest.raises(TokenizerError, match=r"1000 token ids, but the model has only 999.*vocab_size=1000"):
        check_vocabulary(tokenizer, 999, trained=False)
    with pytest.raises(TokenizerError, match=r"has only 999.*use the tokenizer that the model was trained with"):
        check_vocabulary(tokenizer, 999)


@pytest.mark.more
def test_loading_is_silent_and_offline(folder: Path) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from relora_mora.tokenizer.load import encode, load_tokenizer\n"
        f"tokenizer = load_tokenizer({str(folder)!r})\n"
        "assert encode(tokenizer, ['x' * 100_000, 'y'])[1]\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY")
    }
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
