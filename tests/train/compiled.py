"""Runs with compiled layers, and how many graphs they compile."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch

from relora_mora.system.process import missing_to_compile
from tests.tools.runs import train

compiler_only = pytest.mark.skipif(
    missing_to_compile("C" if os.environ.get("TEST_DEVICE") == "cuda" else "C++") is not None,
    reason="torch.compile needs a compiler",
)


def compiled_graphs(config: Any) -> tuple[int, int]:
    """Trains, and counts the programs that torch.compile made: before the first step, and in all."""
    from torch._dynamo.utils import counters

    from relora_mora.train.begin.build import warm_up

    def programs() -> int:
        """Those of forward and backward, whether they were in the compiler's cache or not."""
        return sum(counters["inductor"][f"fxgraph_cache_{found}"] for found in ("hit", "miss", "bypass"))

    at_start = []
    torch._dynamo.reset()
    counters.clear()
    with mock.patch("relora_mora.train.pretrain.warm_up", lambda *args: at_start.append(warm_up(*args) or programs())):
        train(config)
    assert not counters["graph_break"], dict(counters["graph_break"])
    return at_start[0], programs()
