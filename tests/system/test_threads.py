"""How OpenMP's threads wait, as OpenMP itself says it when torch is loaded, in a fresh process."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.more

CODE = """
from relora_mora.system.process import many_imports
with many_imports():
    import torch
"""


def _spins(**environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        check=True,
        env={**inherited, **environment, "OMP_DISPLAY_ENV": "verbose"},
    )
    match = re.search(r"GOMP_SPINCOUNT = '(\w+)'", run.stderr)
    assert match is not None, "the wheels of torch for Linux bring GNU's OpenMP"
    return int(match[1]) if match[1].isdigit() else sys.maxsize


def test_idle_threads_sleep_soon_unless_the_environment_says_otherwise():
    assert _spins() == 3000
    assert _spins(OMP_WAIT_POLICY="active") > 10**9
    assert _spins(GOMP_SPINCOUNT="7") == 7
