"""Adding tokens to a tokenizer of either kind: old ids stay, texts round-trip, and the new tokens are used."""

import json
from pathlib import Path

import pytest

from relora_mora.tokenizer.extend import Extension, most_frequent_merges
from relora_mora.tokenizer.files import TokenizerError
from relora_mora.tokenizer.identity import vocabulary_size
from relora_mora.tokenizer.load import HARD_TEXTS, encode, load_tokenizer
from tests.tools.commands import call, refused
from tests.tools.each import each
from tests.tools.tokenizer_tools import save_bytes_tokenizer, save_other_tokenizer, train_tokenizer

EXTEND = "extend-tokenizer"
TEXTS = ["immunoglobulin of the hepatocyte in 2024\n", "the hepatocyte, immunoglobulin and 2024 hepatocytes"] * 3


def tokenizer_of(kind: str, folder: Path) -> Path:
    if kind == "json":
        return save_other_tokenizer(folder)
    if kind == "json without its end in the vocabulary":
        return _with_added_end(save_other_tokenizer(folder))
    if kind == "bytes":
        save_bytes_tokenizer(folder)
        return folder
    train_tokenizer(folder, add_dummy_prefix=kind == "sentencepiece with a space before")
    return folder


def _with_added_end(folder: Path) -> Path:
    """As in Qwen and Llama 3: special tokens have ids after those of the model's vocabulary."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    del vocab["<|endoftext|>"]
    content["model"]["vocab"] = {token: number - 1 for token, number in vocab.items()}
    content["added_tokens"][0]["id"] = len(vocab)
    path.write_text(json.dumps(content))
    return folder


KINDS = (
    "json",
    "json without its end in the vocabulary",
    "bytes",
    "sentencepiece",
    "sentencepiece with a space before",
)


@each("kind", KINDS)
def test_old_ids_stay_and_new_tokens_are_used(tmp_path, kind):
    folder = tokenizer_of(kind, tmp_path / "old")
    extension = Extension(folder)
    extension.learn(TEXTS, 15)
    before, after = extension.save(tmp_path / "new", TEXTS)
    assert after > 1.5 * before
    old, new = load_tokenizer(folder), load_tokenizer(tmp_path / "new")
    assert new.get_vocab().items() > old.get_vocab().items()
    assert vocabulary_size(new) == vocabulary_size(old) + 15 == len(new.get_vocab())
    assert new.eos_token_id == old.eos_token_id
    for text, ids in zip([*HARD_TEXTS, *TEXTS], encode(new, [*HARD_TEXTS, *TEXTS]), strict=True):
        assert new.decode(ids) == old.decode(old.encode(text, add_special_tokens=False, split_special_tokens=True))
    used = {number for ids in encode(new, TEXTS) for number in ids}
    assert max(used) >= vocabulary_size(old)


@each("kind", KINDS)
def test_a_list_of_pieces_becomes_tokens(tmp_path, kind):
    extension = Extension(tokenizer_of(kind, tmp_path / "old"))
    extension.add(["hematosis", " mandible", " hematosis"])
    extension.save(tmp_path / "new", TEXTS)
    new = load_tokenizer(tmp_path / "new")
    names = [new.convert_ids_to_tokens(ids) for ids in encode(new, ["x mandible", "x hematosis"])]
    assert [name[-1].lstrip("\u2581\u0120") for name in names] == ["mandible", "hematosis"]


def test_digits_are_joined_only_if_the_tokenizer_joins_some(tmp_path):
    texts = ["in 1999 and 1999 or 1999"] * 5
    joined = {}
    for kind in ("json", "bytes"):
        extension = Extension(tokenizer_of(kind, tmp_path / kind))
        extension.learn(texts, 3)
        joined[kind] = any(any(map(str.isdigit, token)) for token in extension.tokens)
    assert joined == {"json": True, "bytes": False}


def test_merges_save_the_most_at_each_step():
    words = {"abcd": (list("abcd"), 3), "cd": (list("cd"), 4), "xab": (list("xab"), 1), "once": (list("once"), 1)}
    merges = list(most_frequent_merges(words, {"a", "b", "c", "d"}))
    assert merges == [("c", "d"), ("a", "b"), ("ab", "cd")]
    assert ("a", "b") not in most_frequent_merges(words, {"ab"}), "a known token that merges do not make is left alone"
    assert not list(most_frequent_merges({"zz": (["", "z", ""], 9)}, ())), "nothing joins what is not known"


def test_the_command_prints_what_it_saved(tmp_path):
    folder = tokenizer_of("json", tmp_path / "old")
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    answer = call(EXTEND, folder, tmp_path / "new", f"--data={data}", "--pieces=10")
    assert answer.code == 0, answer.err
    assert "10 new tokens, 288 token ids" in answer.out
    assert "--model.new_tokens" in answer.out
    (tmp_path / "list.txt").write_text("\ufeffhepatocyte\n\n hepatocyte\nhepatocyte\n")
    answer = call(EXTEND, folder, tmp_path / "listed", f"--data={data}", f"--list={tmp_path}/list.txt")
    assert answer.code == 0, answer.err
    assert "before" in answer.out


def test_bad_input_gets_one_message(tmp_path):
    folder = tokenizer_of("json", tmp_path / "old")
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "one.jsonl").write_text('{"text": "a single document"}\n')
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "words.txt").write_text("in vitro\n")
    (tmp_path / "wordpiece").mkdir()
    _wordpiece(tmp_path / "wordpiece")
    out = tmp_path / "out"
    for argv, named in (
        ([folder, out, f"--data={data}", "--pieces=9999"], "--pieces=9999"),
        ([folder, out, f"--data={data}", "--pieces=0"], "--pieces"),
        ([folder, out, f"--data={tmp_path}/one.jsonl"], "held out"),
        ([folder, out, f"--data={data}", f"--list={tmp_path}/none.txt"], "--list"),
        ([folder, out, f"--data={data}", f"--list={tmp_path}/empty.txt"], "--list"),
        ([folder, out, f"--data={data}", f"--list={tmp_path}/words.txt"], "'in vitro'"),
        ([tmp_path / "none", out, f"--data={data}"], "not found"),
        ([tmp_path / "wordpiece", out, f"--data={data}"], "BPE"),
        ([folder, folder, f"--data={data}"], "old"),
    ):
        refused(call(EXTEND, *argv), named)
        assert not out.exists()


def _wordpiece(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.add_special_tokens(["<end>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


def test_a_pieces_file_needs_characters_that_the_tokenizer_has(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "<end>": 2, "?": 3}, [], unk_token="?"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    with pytest.raises(TokenizerError, match="lacks its characters"):
        Extension(tmp_path).add(["ab\u00e9"])
