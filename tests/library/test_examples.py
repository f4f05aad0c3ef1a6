"""The examples run as their README says, and print what it promises."""

import contextlib
import importlib.util
import io
import math
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from tests.tools.fsdp_on_cpus import fsdp_on_cpus
from tests.tools.helpers import ROOT
from tests.tools.pool import Pools

pytestmark = [pytest.mark.more, pytest.mark.distributed]
STEPS = ("--steps", "12", "--merge-every", "5")  # with merges after steps 5 and 10
SAME = 1e-5


def run_script(script: str, options: tuple[str, ...]) -> str:
    """Runs on each rank: what a script prints, with FSDP if it asks for it. The ranks stay joined."""
    output = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [script, *options]),
        mock.patch("torch.distributed.destroy_process_group"),
        contextlib.redirect_stdout(output),
        fsdp_on_cpus(),
    ):
        try:
            runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
    return output.getvalue()


@pytest.fixture
def start(pools: Pools) -> Callable[..., str]:
    """Starts an example on a number of ranks, and returns what the first one prints."""
    return lambda script, *options, ranks=1: pools(ranks)(run_script, script, (*STEPS, *map(str, options)))[0]


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


def test_plain_loop_and_its_resume(start: Callable[..., str], tmp_path: Path) -> None:
    saved = ("--checkpoint", tmp_path / "runs" / "plain_loop.pt")
    whole = start("plain_loop.py")
    check(whole, learns=True)
    begun, message, _ = start("plain_loop.py", *saved, "--stop-after", 7).partition("step 7: saved")
    assert message
    assert begun + start("plain_loop.py", *saved, "--resume") == whole


def test_huggingface_trainer(start: Callable[..., str], tmp_path: Path) -> None:
    check(start("huggingface_trainer.py", "--output-dir", tmp_path), learns=True)
    assert (tmp_path / "model.safetensors").is_file()


def test_accelerate_fsdp2(start: Callable[..., str]) -> None:
    output = start("accelerate_fsdp2.py", ranks=2)
    check(output, learns=True)
    assert "the parameters are sharded" in output


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_diffusion_unet(start: Callable[..., str]) -> None:
    check(start("diffusion_unet.py"), learns=True)


def test_the_readme_lists_every_example() -> None:
    lines = (ROOT / "examples" / "README.md").read_text(encoding="utf-8").splitlines()
    for path in [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.ipynb")]:
        [line] = [line for line in lines if line.startswith(f"| [{path.name}]")]
        assert f" examples/{path.name}" in line
