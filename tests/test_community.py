"""The files that hosts and tools read follow their schemas, and SECURITY.md is true of the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import relora_mora
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more

SCHEMAS = {
    "CITATION.cff": "citation-file-format",
    ".github/ISSUE_TEMPLATE/bug.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/question.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    ".github/workflows/ci.yml": "github-workflows",
    "compose.yaml": "compose-spec",
}
# what could run code from a file; ruff's rules S find the rest, such as pickle.load and eval
DANGERS = re.compile(
    r"torch\.load\(|yaml\.(unsafe|full)_load|import (dill|cloudpickle|joblib|shelve|cPickle)|__import__\("
    r"|(trust_remote_code|allow_pickle|shell)=(?!False)|weights_only=(?!True)"
)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_file_follows_its_schema(name: str) -> None:
    check = str(Path(sys.executable).parent / "check-jsonschema")
    command = [check, "--builtin-schema", f"vendor.{SCHEMAS[name]}", str(ROOT / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_is_of_this_version_or_the_next() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert Version(cited["version"]) >= Version(relora_mora.__version__)


def test_nothing_unpickles_or_executes_what_it_reads() -> None:
    paths = [path for folder in ("relora_mora", "launch", "tokenizer") for path in (ROOT / folder).rglob("*.py")]
    found = {path.name: danger[0] for path in paths if (danger := DANGERS.search(path.read_text(encoding="utf-8")))}
    assert paths
    assert found == {}
