"""What freed memory costs, in page faults; each in a fresh process, as settings of malloc cannot be undone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: the counts are of pages of 4 KiB
from relora_mora.system.allocator import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16 * 2**20)
before = faults()
for _ in range(4):
    torch.ones(16 * 2**20)  # 64 MiB
print(done, faults() - before)
"""


def _faults(mode: str, **environment: str) -> tuple[str, int]:
    run = subprocess.run(
        [sys.executable, "-c", CODE, mode],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment, "LD_PRELOAD": ""},
    )
    done, count = run.stdout.split()
    return done, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    _, plain = _faults("plain")
    done, kept = _faults("keep")
    assert done == "True" and kept < 100 < 4 * 1000 < plain


def test_settings_in_the_environment_win():
    assert _faults("keep", MALLOC_TRIM_THRESHOLD_="100000")[0] == "False"
    assert _faults("keep", GLIBC_TUNABLES="glibc.malloc.tcache_count=5")[0] == "False"
