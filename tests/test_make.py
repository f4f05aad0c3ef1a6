"""make: how it recognizes its own environment, with a stand-in for Python that installs nothing, and its release."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tools.each import each
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more


def make_checkout(folder: Path) -> None:
    """A repository with version 1.1.0, whose packages are one empty file."""
    for name in ("relora_mora", ".ci"):
        (folder / name).mkdir()
    (folder / "relora_mora" / "__init__.py").write_text('__version__ = "1.1.0"\n')
    (folder / "CHANGELOG.md").write_text("# Changelog\n\n## [1.1.0]\n\n- new\n\n## [1.0.0]\n\n- old\n")
    (folder / "Makefile").write_text("packages:\n\t@mkdir -p dist && touch dist/made.whl\n")
    (folder / ".gitignore").write_text("dist/\n")
    shutil.copy(ROOT / ".ci" / "release", folder / ".ci")
    for words in (["init", "--quiet"], ["config", "user.name", "x"], ["config", "user.email", "x@example.com"]):
        git(folder, *words)
    commit(folder)


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=x")


def release(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([folder / ".ci" / "release"], capture_output=True, text=True, check=False)


def test_the_commit_is_tagged_with_the_notes_of_its_version(tmp_path: Path) -> None:
    make_checkout(tmp_path)
    done = release(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dist" / "NOTES.md").read_text() == "# relora_mora 1.1.0\n\n- new\n"
    assert git(tmp_path, "tag", "--format=%(contents)").strip() == "# relora_mora 1.1.0\n\n- new"
    assert "twine upload dist/*.whl" in done.stdout
    assert release(tmp_path).returncode == 2


@each(
    "file,text,committed",
    [
        ("other", "x", False),
        ("CHANGELOG.md", "## [1.1.0]\n\n## [1.0.0]\n\n- old\n", True),
        ("CHANGELOG.md", "## [1.1.0rc1]\n\n- new\n", True),
    ],
)
def test_nothing_is_made_of_a_changed_checkout_or_without_notes(
    tmp_path: Path, file: str, text: str, committed: bool
) -> None:
    make_checkout(tmp_path)
    (tmp_path / file).write_text(text)
    if committed:
        commit(tmp_path)
    assert release(tmp_path).returncode == 2
    assert not (tmp_path / "dist").exists()
    assert git(tmp_path, "tag") == ""


FILES = ("Makefile", "setup.cfg", "setup.py", "pyproject.toml", "relora_mora/kernels/kernels.c")


@pytest.fixture
def sources(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
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


@pytest.mark.parametrize("sources", ["plain", "with space", "it's, (odd) ü"], indirect=True)
def test_an_environment_is_made_once(sources: Path) -> None:
    first = make(sources, "env")
    assert (first.returncode, first.stderr) == (0, "")
    assert ("the path has a space" in first.stdout) == (" " in sources.name)
    assert "Nothing to be done" in make(sources, "env").stdout


@pytest.mark.parametrize("sources", ["plain", "with space"], indirect=True)
def test_an_environment_copied_with_its_checkout_is_refused(sources: Path, tmp_path: Path) -> None:
    make(sources, "env")
    copy = shutil.copytree(sources, tmp_path / "copy")
    refused = make(copy, "env")
    assert refused.returncode == 2
    assert f".venv was made in {sources} and runs the code there: remove it" in refused.stderr
    assert make(copy, "clean").returncode == 0
    assert not (copy / ".venv").exists()
