"""The examples run as their README says, and print what it promises."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.helpers import ROOT, python_path

STEPS = ("--steps", "12", "--merge-every", "5")  # with merges after steps 5 and 10
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SAME = 1e-5


def start(script: str, *options: object, launcher: tuple[str, ...] = ()) -> str:
    """What an example prints, which must succeed."""
    command = [sys.executable, *launcher, f"examples/{script}", *STEPS, *map(str, options)]
    environment = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"(?<!_)loss\W+([\w.]+)", output)]


def check(output: str, *, learns: bool) -> None:
    values = losses(output)
    assert len(values) > 5
    assert all(map(math.isfinite, values))
    assert not learns or values[-1] < values[0]
    merges = re.findall(r"step (\d+): merge, operator (\d) -> (\d)", output)
    assert merges == [("5", "1", "2"), ("10", "2", "1")]
    [difference] = re.findall(r"the merged model has the same output up to (\S+)", output)
    assert float(difference) < SAME


def test_plain_loop_and_its_resume(tmp_path: Path) -> None:
    saved = ("--checkpoint", tmp_path / "runs" / "plain_loop.pt")
    whole = start("plain_loop.py")
    check(whole, learns=True)
    begun, message, _ = start("plain_loop.py", *saved, "--stop-after", 7).partition("step 7: saved")
    assert message
    assert begun + start("plain_loop.py", *saved, "--resume") == whole


def test_huggingface_trainer(tmp_path: Path) -> None:
    check(start("huggingface_trainer.py", "--output-dir", tmp_path), learns=True)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.distributed
def test_accelerate_fsdp2() -> None:
    output = start("accelerate_fsdp2.py", launcher=(*TORCHRUN, "tests/tools/fsdp_on_cpus.py"))
    check(output, learns=True)
    assert "the parameters are sharded" in output


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_diffusion_unet() -> None:
    check(start("diffusion_unet.py"), learns=True)


def test_the_readme_lists_every_example() -> None:
    lines = (ROOT / "examples" / "README.md").read_text(encoding="utf-8").splitlines()
    for path in (ROOT / "examples").glob("*.py"):
        [line] = [line for line in lines if line.startswith(f"| [{path.name}]")]
        assert f"examples/{path.name}`" in line
