"""make release: a tag with the notes of its version, and nothing if something is missing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more

CHANGES = "# Changelog\n\n## [1.1.0]\n\n- new\n\n## [1.0.0]\n\n- old\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with version 1.1.0, whose packages are one empty file."""
    (tmp_path / "relora_mora").mkdir()
    (tmp_path / "relora_mora" / "__init__.py").write_text('__version__ = "1.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGES)
    (tmp_path / "Makefile").write_text("packages:\n\t@mkdir -p dist && touch dist/made.whl\n")
    (tmp_path / ".gitignore").write_text("dist/\n")
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "release", tmp_path / ".ci")
    for words in (["init", "--quiet"], ["config", "user.name", "x"], ["config", "user.email", "x@example.com"]):
        git(tmp_path, *words)
    commit(tmp_path)
    return tmp_path


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=x")


def release(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([folder / ".ci" / "release"], capture_output=True, text=True, check=False)


def test_the_commit_is_tagged_with_the_notes_of_its_version(checkout: Path) -> None:
    done = release(checkout)
    assert done.returncode == 0, done.stderr
    assert (checkout / "dist" / "NOTES.md").read_text() == "# relora_mora 1.1.0\n\n- new\n"
    assert git(checkout, "tag", "--format=%(contents)").strip() == "# relora_mora 1.1.0\n\n- new"
    assert "twine upload dist/*.whl" in done.stdout
    assert release(checkout).returncode == 2


@pytest.mark.parametrize(
    ("file", "text", "committed"),
    [
        ("other", "x", False),
        ("CHANGELOG.md", "## [1.1.0]\n\n## [1.0.0]\n\n- old\n", True),
        ("CHANGELOG.md", "## [1.1.0rc1]\n\n- new\n", True),
    ],
)
def test_nothing_is_made_of_a_changed_checkout_or_without_notes(
    checkout: Path, file: str, text: str, committed: bool
) -> None:
    (checkout / file).write_text(text)
    if committed:
        commit(checkout)
    assert release(checkout).returncode == 2
    assert not (checkout / "dist").exists()
    assert git(checkout, "tag") == ""
