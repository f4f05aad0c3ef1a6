"""make: how it recognizes its own environment, with a stand-in for Python that installs nothing, and its release."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tools.each import each
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout


def release(folder: Path, changes: dict[str, str], *, committed: bool) -> subprocess.CompletedProcess[str]:
    """Of a repository with version 1.1.0, whose packages are one empty file, after changes to its files."""
    files = {
        "relora_mora/__init__.py": '__version__ = "1.1.0"\n',
        "CHANGELOG.md": "# Changelog\n\n## [1.1.0]\n\n- new\n\n## [1.0.0]\n\n- old\n",
        "Makefile": "packages:\n\t@mkdir -p dist && touch dist/made.whl\n",
        ".gitignore": "dist/\n",
        ".ci/release": (ROOT / ".ci" / "release").read_text(),
    }
    git(folder, "init", "--quiet")
    for key, value in (("user.name", "x"), ("user.email", "x@example.com"), ("core.fileMode", "false")):
        git(folder, "config", key, value)
    for step in (files, changes):
        for name, text in step.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        if step is files or committed:
            git(folder, "add", "--all")
            git(folder, "commit", "--quiet", "--message=x", "--allow-empty")
    script = folder / ".ci" / "release"
    script.chmod(0o755)
    return subprocess.run([script], capture_output=True, text=True, check=False)


def test_the_commit_is_tagged_with_the_notes_of_its_version(tmp_path: Path) -> None:
    done = release(tmp_path, {}, committed=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dist" / "NOTES.md").read_text() == "# relora_mora 1.1.0\n\n- new\n"
    assert git(tmp_path, "tag", "--format=%(contents)").strip() == "# relora_mora 1.1.0\n\n- new"
    assert "twine upload dist/*.whl" in done.stdout


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
    assert release(tmp_path, {file: text}, committed=committed).returncode == 2
    assert not (tmp_path / "dist").exists()
    assert git(tmp_path, "tag") == ""


def make(folder: Path, *goals: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *goals], cwd=folder, capture_output=True, text=True, check=False)


@each("name", ["plain", "with space", "it's, (odd) \u00fc"])
def test_an_environment_is_made_once_and_refused_in_a_copy(tmp_path: Path, name: str) -> None:
    sources = tmp_path / name
    for file in ("Makefile", "setup.cfg", "setup.py", "pyproject.toml", "relora_mora/kernels/kernels.c"):
        (sources / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, sources / file)
    python = sources / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    first = make(sources, "env")
    assert (first.returncode, first.stderr) == (0, "")
    assert ("the path has a space" in first.stdout) == (" " in name)
    assert "Nothing to be done" in make(sources, "env").stdout
    copy = shutil.copytree(sources, tmp_path / "copy")
    refused = make(copy, "env")
    assert refused.returncode == 2
    assert f".venv was made in {sources} and runs the code there: remove it" in refused.stderr
    assert make(copy, "clean").returncode == 0
    assert not (copy / ".venv").exists()
