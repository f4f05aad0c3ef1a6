"""The answers of held-out records, apart from what stands before them: to be generated and compared."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from relora_mora.data.packing import Tokens
from relora_mora.data.rows import Encoded


class Answer(NamedTuple):
    """Token ids, int32: what stands before an answer, and the answer with the end that it is to learn."""

    prompt: Tokens
    answer: Tokens


def answer_of(row: Encoded) -> Answer | None:
    """The last answer of a record; None where there is none behind a prompt, or it is not whole."""
    if row.scored is None or row.cut:
        return None
    scored = np.asarray(row.scored, np.bool_)
    ids = np.asarray(row.ids, np.int32)
    end = int(np.flatnonzero(scored)[-1]) + 1
    before = np.flatnonzero(~scored[:end])
    if not len(before):
        return None
    begin = int(before[-1]) + 1
    return Answer(ids[:begin], ids[begin:end])
