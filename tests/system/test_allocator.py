"""What freed memory costs, in page faults; in a fresh process, as settings of malloc cannot be undone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from relora_mora.system.process import keep_freed_memory
from tests.tools.each import each

pytestmark = pytest.mark.more

CODE = """
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: the counts are of pages of 4 KiB
from relora_mora.system.process import keep_freed_memory
def faults():
    torch.ones(16 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    run = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env={**os.environ, "LD_PRELOAD": ""}
    )
    plain, done, kept = run.stdout.split()
    assert done == "True"
    assert int(kept) < 100 < 4 * 1000 < int(plain)


@each("name,value", [("MALLOC_TRIM_THRESHOLD_", "100000"), ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=5")])
def test_settings_in_the_environment_win(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
