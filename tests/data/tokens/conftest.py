"""Fixtures of the tests of pre-tokenized text."""

from __future__ import annotations

import pytest

from relora_mora.data.tokens import make as token_writer
from tests.data.tokens.tools import KINDS, make, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_path):
    """Text in both formats, and next to it the same text as tokens."""
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_writer, "BATCH_ROWS", 10)  # a shard is several record batches
        patch.setattr(token_writer, "TEXTS_PER_CALL", 7)
        for kind in KINDS:
            write_text(folder / kind, kind)
            for name in ("few", "many", "bad", "odd"):
                make(folder / kind / name / "*", folder / kind / f"{name}.tokens", tokenizer_path)
    return folder
