"""Fixtures that several test modules use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.jobs import kill_all


@pytest.fixture(autouse=True)
def no_job_outlives_its_test() -> Iterator[None]:
    yield
    kill_all()


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small sentencepiece model (byte fallback, 300 pieces), trained on the spot."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("tokenizer")
    text = ["the rank of a merge", "matrix over the rank", "größer als the matrix", "one more of the same", "0123456789 - abcdefghij"]
    SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return str(folder)
