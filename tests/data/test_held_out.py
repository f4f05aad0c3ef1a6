"""Held-out text: the same tokens scored once on any number of ranks."""

import math
from collections import Counter

import pytest
import torch

from relora_mora.data.errors import SourceError
from relora_mora.data.stream.packing import UNSCORED
from relora_mora.tokenizer.load import encode, load_tokenizer
from tests.tools.data_tools import eval_set, some_texts, write_shard
from tests.tools.each import each


def _stream(held_out):
    """The tokens of all blocks one after the other, without the padding of the last one."""
    inputs = held_out.tokens[:, :-1].ravel()
    return [*inputs, *held_out.tokens[-1:, -1]][: held_out.predicted + 1]


@pytest.fixture(scope="module")
def texts():
    return some_texts(100, seed=7)


@pytest.fixture(scope="module")
def path(texts, tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("held-out") / "a.json.gz", texts)


def test_the_tokens_are_whole_documents_between_eos(path, texts, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    eos = tokenizer.eos_token_id
    expected = [eos]
    for ids in encode(tokenizer, texts):
        expected += [*ids, eos]
    whole = eval_set(path, tokenizer_path)
    assert _stream(whole) == expected
    assert (whole.predicted, whole.documents) == (len(expected) - 1, 100)
    assert whole.utf8_bytes == sum(len(text.encode()) for text in texts)


def test_the_digest_depends_only_on_the_tokens(path, texts, tokenizer_path, tmp_path):
    whole = eval_set(path, tokenizer_path)
    plain = write_shard(tmp_path / "b.json", texts)
    assert whole.digest == eval_set(plain, tokenizer_path, length=8).digest
    assert whole.digest != eval_set(path, tokenizer_path, max_tokens=whole.predicted - 1).digest
    backwards = eval_set(write_shard(tmp_path / "c.json", texts[::-1]), tokenizer_path)
    assert backwards.digest != whole.digest
    assert backwards.predicted == whole.predicted


def test_max_tokens_cuts_between_documents(path, texts, tokenizer_path):
    lengths = [len(ids) + 1 for ids in encode(load_tokenizer(tokenizer_path), texts)]
    exact = sum(lengths[:70])
    for max_tokens, documents in ((exact, 70), (exact - 1, 69), (exact + 1, 70), (1, 1)):
        part = eval_set(path, tokenizer_path, max_tokens=max_tokens)
        assert (part.documents, part.predicted) == (documents, sum(lengths[:documents]))
        assert part.utf8_bytes == sum(len(text.encode()) for text in texts[:documents])


@each("world_size,micro_batch_size", [(1, 1), (1, 64), (2, 3), (4, 16), (7, 50), (2, 10**15)])
def test_every_token_is_scored_once_on_any_number_of_ranks(path, tokenizer_path, world_size, micro_batch_size):
    held_out = eval_set(path, tokenizer_path, max_tokens=1500)
    assert held_out.predicted % 16  # the last block is short
    scored = Counter()
    counts = []
    blocks_of_rank = math.ceil(math.ceil(held_out.predicted / 16) / world_size)
    rows = min(micro_batch_size, blocks_of_rank)  # not more than there is text for
    for rank in range(world_size):
        batches = list(held_out.batches(rank, world_size, micro_batch_size))
        counts.append(len(batches))
        for inputs, labels, documents in batches:
            assert documents is None
            assert inputs.shape == labels.shape == (rows, 16)
            assert inputs.dtype == labels.dtype == torch.int64
            for row, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
                known = [(token, target) for token, target in zip(row, targets, strict=True) if target != UNSCORED]
                if known:
                    scored[tuple(known)] += 1
                assert row[len(known) :] == [held_out.eos] * (16 - len(known))
    assert len(set(counts)) == 1
    assert counts[0] >= 1
    tokens = _stream(held_out)
    blocks = [
        list(zip(tokens[at : at + 16], tokens[at + 1 : at + 17], strict=False))
        for at in range(0, held_out.predicted, 16)
    ]
    assert scored == Counter(tuple(block) for block in blocks)


def test_documents_are_numbered_as_in_training(path, tokenizer_path):
    held_out = eval_set(path, tokenizer_path, max_tokens=500, document_mask=True)
    seen = 0
    for inputs, _, documents in held_out.batches(0, 1, 4):
        assert documents is not None
        assert documents.shape == inputs.shape
        for row, numbers in zip(inputs.tolist(), documents.tolist(), strict=True):
            assert numbers == [row[: at + 1].count(held_out.eos) for at in range(16)]
            seen = max(seen, numbers[-1])
    assert seen > 1


def test_no_text_is_refused(tmp_path, tokenizer_path):
    with pytest.raises(SourceError, match="holds no text"):
        eval_set(write_shard(tmp_path / "a.json", [""]), tokenizer_path)
    with pytest.raises(SourceError, match="no file matches"):
        eval_set(tmp_path / "gone.json", tokenizer_path)


def test_a_long_document_that_leaves_most_of_the_text_unscored_is_named(tokenizer_path, tmp_path, caplog):
    path = write_shard(tmp_path / "long.json", ["a short text", "and a very long one " * 100])
    for max_tokens, warns in ((100, True), (20, False)):
        caplog.clear()
        eval_set(path, tokenizer_path, max_tokens=max_tokens)
        assert [record.args[2] for record in caplog.records] == ["100"] * warns, (max_tokens, caplog.text)
