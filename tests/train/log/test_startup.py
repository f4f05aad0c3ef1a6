"""A start imports nothing that it does not need."""

from __future__ import annotations

import sys

import pytest

from tests.tools.pool import Pool
from tests.tools.tiny import build_rig, tiny_config


def has_imported_the_compiler() -> bool:
    build_rig(tiny_config(1, train={"zero_stage": 1}), bf16=True)
    return "torch._inductor.compile_fx" in sys.modules


@pytest.mark.distributed
def test_an_engine_does_not_import_torchs_compiler():
    """Seconds of each start."""
    pool = Pool(1)  # of its own: other tests compile
    try:
        assert pool(has_imported_the_compiler) == [False]
    finally:
        pool.close()
