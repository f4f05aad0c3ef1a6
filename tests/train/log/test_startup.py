"""The seconds of a start count from the command, no matter what its process did before."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relora_mora.train.log import progress
from tests.tools.pool import Pool
from tests.tools.tiny import build_rig, tiny_config


@pytest.mark.more
def test_time_before_an_exec_is_not_counted(tmp_path: Path) -> None:
    functions = "".join(map(inspect.getsource, (progress._age_of_interpreter, progress._age)))
    script = tmp_path / "script.py"  # only the functions: importing the trainer takes longer than all of this
    imports = "import logging, os, time\nfrom pathlib import Path\n"
    script.write_text(f"{imports}{functions}\nprint(_age_of_interpreter(), _age(os.getpid()))")
    done = subprocess.run(
        ["sh", "-c", f"sleep 1; exec {sys.executable} {script}"], capture_output=True, text=True, check=True
    )
    of_python, of_the_process = map(float, done.stdout.split())
    assert 0 < of_python <= of_the_process - 0.9


def test_without_an_exec_the_interpreter_is_younger_than_its_process() -> None:
    assert 0 < progress._age_of_interpreter() <= progress._age(os.getpid())


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
