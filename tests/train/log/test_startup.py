"""The seconds of a start count from the command, no matter what its process did before."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from relora_mora.train.log import progress
from tests.tools.pool import Pool
from tests.tools.tiny import build_rig, tiny_config


@pytest.mark.more
def test_time_before_an_exec_is_not_counted(tmp_path: Path) -> None:
    functions = "".join(map(inspect.getsource, (progress.seconds_since_start,)))
    script = tmp_path / "script.py"  # only the functions: importing the trainer takes longer than all of this
    imports = "import logging\n"
    script.write_text(f"{imports}{functions}\nprint(seconds_since_start())")
    done = subprocess.run(
        ["sh", "-c", f"sleep 1; exec {sys.executable} {script}"], capture_output=True, text=True, check=True
    )
    assert 0 < float(done.stdout) < 1


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
