"""Training a tokenizer: what is fed to sentencepiece, the sample, messages, the program."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece

from relora_mora.tokenizer import training
from relora_mora.tokenizer.files import TokenizerError
from relora_mora.tokenizer.identity import vocabulary_size
from relora_mora.tokenizer.load import load_tokenizer
from tests.tools.commands import TRAIN, call, left_in, refused
from tests.tools.tokenizer_tools import own_text

pytestmark = pytest.mark.more


def test_lines_are_fed_whole_or_cut() -> None:
    long = "é" * 40_000
    fed = list(training.sentences(["a\nb\r\n\n c\0d\u2581e\u2585f", long]))
    assert fed[:6] == ["a", "b\r", " c", "d", "e", "f"]
    assert "".join(fed[6:]) == long
    assert max(len(sentence.encode()) for sentence in fed) <= training.SENTENCE_BYTES


def test_long_documents_are_trained_on() -> None:
    """Fed as they are, both would be dropped without a word and the vocabulary would be empty."""
    documents = [("unmistakable\nevidence\n" * 5000), "unmistakable evidence " * 5000]
    assert all(len(text) > training.SENTENCE_BYTES for text in documents)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=training.train(documents, vocab_size=310))
    assert pieces.encode("unmistakable evidence", out_type=str) == ["unmistakable", "▁evidence"]


def test_sample_is_bounded_seeded_and_uniform() -> None:
    def texts() -> Iterator[str]:
        yield from (f"{number:04}" for number in range(1000))

    all_of_it, read = training.sample(texts(), max_bytes=4000, seed=0)
    assert (all_of_it, read) == (list(texts()), 1000)
    (first, read), (again, _), (other, _) = (training.sample(texts(), max_bytes=401, seed=seed) for seed in (0, 0, 1))
    assert (len(first), read) == (100, 1000)
    assert sorted(first) == first == again != other
    counts = [0] * 10
    for seed in range(50):
        for text in training.sample(texts(), max_bytes=400, seed=seed)[0]:
            counts[int(text) // 100] += 1
    assert all(400 < count < 600 for count in counts), counts  # 500 in each tenth; 100 is more than 4 deviations
    assert training.sample(iter(["x" * 50, "é" * 5, "y"]), max_bytes=11, seed=0)[0] == ["é" * 5, "y"]
    assert training.sample(iter([]), max_bytes=1, seed=0) == ([], 0)


def test_vocabulary_that_does_not_fit_the_text_is_explained() -> None:
    with pytest.raises(TokenizerError, match=r"--vocab_size=1000 on this text: Vocabulary size too high") as caught:
        training.train(["hello world, hello"], vocab_size=1000)
    most = int(str(caught.value).split("<= ")[1].split(";")[0])
    model = training.train(["hello world, hello"], vocab_size=most)
    assert len(sentencepiece.SentencePieceProcessor(model_proto=model)) == most
    for text, size, fault in (("hello world, hello", 262, "required_chars"), ("\n\n", 300, "no line of text")):
        with pytest.raises(TokenizerError, match=rf"--vocab_size={size} on this text: .*{fault}.*; give"):
            training.train([text], vocab_size=size)


def test_training_program(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "text.json.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in own_text())
    out = tmp_path / "new" / "tokenizer"
    data = f"--data={tmp_path}/*.json.gz"
    answer = call(TRAIN, data, f"--out={out}", "--vocab_size=700", "--character_coverage=0.999")
    assert "700 token ids" in answer.out
    assert left_in(out) == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert left_in(out.parent) == ["tokenizer"]
    assert vocabulary_size(load_tokenizer(out)) == 700
    refused(call(TRAIN, data, f"--out={out}"), "exists and is not empty")
    other = f"--out={tmp_path / 'other'}"
    refused(call(TRAIN, data, other, "--max_bytes=5"), "documents fits --max_bytes=5; raise it")
    few = call(TRAIN, f"--data=[{tmp_path}/text.json.gz]", other, "--vocab_size=420", "--max_documents=3")
    assert "training on 3 of the 3 documents read" in few.out
