"""How make recognizes its own environment, with a stand-in for Python that installs nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more

FILES = ("Makefile", "setup.cfg", "setup.py", "pyproject.toml", "relora_mora/kernels/kernels.c")


@pytest.fixture
def checkout(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path / request.param
    for name in (*FILES, ".venv/bin/python"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in FILES:
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv/bin/python").write_text("#!/bin/sh\n")
    (folder / ".venv/bin/python").chmod(0o755)
    return folder


def make(folder: Path, *goals: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *goals], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("checkout", ["plain", "with space", "it's, (odd) ü"], indirect=True)
def test_an_environment_is_made_once(checkout: Path) -> None:
    first = make(checkout, "env")
    assert (first.returncode, first.stderr) == (0, "")
    assert ("the path has a space" in first.stdout) == (" " in checkout.name)
    assert "Nothing to be done" in make(checkout, "env").stdout


@pytest.mark.parametrize("checkout", ["plain", "with space"], indirect=True)
def test_an_environment_copied_with_its_checkout_is_refused(checkout: Path, tmp_path: Path) -> None:
    make(checkout, "env")
    copy = shutil.copytree(checkout, tmp_path / "copy")
    refused = make(copy, "env")
    assert refused.returncode == 2
    assert f".venv was made in {checkout} and runs the code there: remove it" in refused.stderr
    assert make(copy, "clean").returncode == 0
    assert not (copy / ".venv").exists()
