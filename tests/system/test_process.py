"""Freed memory is used again, and idle threads sleep soon; in fresh processes, as neither can be undone."""

import os
import platform
import re
import subprocess
import sys

import pytest

from tests.tools.each import each

pytestmark = pytest.mark.more

FAULTS = """
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: the counts are of pages of 4 KiB
from relora_mora.system.process import keep_freed_memory
def faults():
    torch.ones(16 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
keep_freed_memory()
print(before, faults())
"""
IMPORT = """
from relora_mora.system.process import many_imports
with many_imports():
    import torch
"""


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    given = {**inherited, "LD_PRELOAD": "", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=given)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    plain, kept = _run(FAULTS).stdout.split()
    assert int(kept) < 100 < 4 * 1000 < int(plain)


# as OpenMP itself says it; the wheels of torch for Linux bring GNU's
@each(
    "environment,least,most",
    [({}, 3000, 3000), ({"OMP_WAIT_POLICY": "active"}, 10**9, sys.maxsize), ({"GOMP_SPINCOUNT": "7"}, 7, 7)],
)
def test_idle_threads_sleep_soon_unless_the_environment_says_otherwise(environment, least, most):
    found = re.search(r"GOMP_SPINCOUNT = '(\w+)'", _run(IMPORT, **environment, OMP_DISPLAY_ENV="verbose").stderr)
    assert least <= (int(found[1]) if found[1].isdigit() else sys.maxsize) <= most
