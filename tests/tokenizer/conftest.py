"""Fixtures of the tests of tokenizers."""

from pathlib import Path

import pytest

from relora_mora.tokenizer import training
from tests.tools.tokenizer_tools import own_text


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tokenizer of 1,000 ids, as tokenizer/train.py writes it."""
    out = tmp_path_factory.mktemp("tokenizer") / "trained"
    documents = own_text()
    training.write(training.train(documents, vocab_size=1000, character_coverage=0.9995), out, documents)
    return out
