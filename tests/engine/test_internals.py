"""Modules of DeepSpeed beyond its documentation are imported in one place, and no more than needed at a start."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.tools.helpers import ROOT


@pytest.mark.more
def test_only_one_file_imports_modules_of_deepspeed() -> None:
    """Elsewhere, a module that moved would end a run with a traceback."""
    for path in sorted((ROOT / "relora_mora").rglob("*.py")):
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {each.name for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{each.name}" for each in node.names}
        private = {name for name in imported if name.startswith("deepspeed.")} - {"deepspeed.comm"}
        assert not private or path.stem == "internals", f"{path}: {private}"


# torch's compiler takes seconds to import
ENGINE = """
import sys
from tests.tools.tiny import build_rig, tiny_config
from relora_mora.engine.start import init_distributed
init_distributed()
build_rig(tiny_config(1, train={"zero_stage": 1}), bf16=True)
assert "torch._inductor.compile_fx" not in sys.modules
"""


def test_an_engine_starts_on_a_cpu_without_a_warning_and_without_torchs_compiler():
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""
