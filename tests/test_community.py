"""The files that the repository's host reads follow their schemas, and SECURITY.md is true of the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import relora_mora
from relora_mora.config import yaml_text
from tests.tools.helpers import ROOT

FILES = {
    "CITATION.cff": "citation-file-format",
    ".github/ISSUE_TEMPLATE/bug.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/question.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    ".github/workflows/ci.yml": "github-workflows",
}


def invalid(schema: str, path: Path) -> str:
    """What a schema says against a file; empty if it follows it."""
    command = [str(Path(sys.executable).parent / "check-jsonschema"), "--builtin-schema", f"vendor.{schema}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_a_file_follows_its_schema(name: str, tmp_path: Path) -> None:
    assert invalid(FILES[name], ROOT / name) == ""
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    wrong = tmp_path / Path(name).name
    wrong.write_text(yaml.safe_dump(content | {"unknwon": 1}), encoding="utf-8")
    assert "unknwon" in invalid(FILES[name], wrong)


def test_every_file_of_the_host_is_checked() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*") if path.is_file()}
    assert found - {".github/pull_request_template.md"} == set(FILES) - {"CITATION.cff"}


def test_the_workflow_runs_everything() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    [job] = workflow["jobs"].values()
    assert job["steps"][-1]["run"] == ".ci/run"


def test_the_citation_is_of_this_version_or_the_next() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert Version(cited["version"]) >= Version(relora_mora.__version__)
    papers = {paper["url"].rpartition("/")[2] for paper in cited["references"]}
    named = set(re.findall(r"arxiv\.org/abs/([\d.]+\d)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert papers <= named


UNPICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
EXECUTES = {"eval", "exec", "compile", "__import__"}
CALLS = {"torch.load", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all", "os.system"}
SAFE = {"trust_remote_code": False, "weights_only": True, "allow_pickle": False, "shell": False}


def dangers(source: str) -> Iterator[str]:
    """Imports, calls and arguments that could run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (module for module in modules if module.split(".")[0] in UNPICKLES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS | EXECUTES:
                yield name
            if name == "yaml.load" and ast.unparse(node.args[-1]) != "_Loader":
                yield name
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
                if keyword.arg in SAFE and value is not SAFE[keyword.arg]:
                    yield f"{name}({keyword.arg}={ast.unparse(keyword.value)})"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "eval(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=given)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_a_danger_is_found(source: str) -> None:
    assert list(dangers(source))


def test_nothing_unpickles_or_executes_what_it_reads() -> None:
    folders = ("relora_mora", "launch", "tokenizer")
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert len(paths) > 200
    assert {path.name: found for path in paths if (found := list(dangers(path.read_text(encoding="utf-8"))))} == {}
    assert issubclass(yaml_text._Loader, yaml.SafeLoader)
