"""The recipes of CONTRIBUTING: their examples fit the code of today, and a run with all of them does what they say."""

from __future__ import annotations

import math
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.helpers import ROOT
from tests.tools.recipes import copy_with_recipes, patches
from tests.tools.runs import checkpoint_at, logged_steps, logged_values, manifest_at, metrics, tensors

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = CONTRIBUTING.partition("## How to add")[2]
# recipes whose result needs a GPU, a server or many lines
WITHOUT_EXAMPLE = {
    "An optimizer of matrices",
    "A kernel for another device",
    "A data source",
    "A page",
    "A task",
    "A test",
}

distributed = pytest.mark.distributed


def in_copy(copy: Path, *arguments: str) -> None:
    """Runs Python in a copy of the repository."""
    done = subprocess.run([sys.executable, *arguments], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with all examples."""
    return copy_with_recipes(tmp_path_factory.mktemp("recipes") / "copy")


@pytest.fixture(scope="module")
def runs(copy: Path, tokenizer_path: str) -> Path:
    """The folder of the two runs of tests/tools/recipe_runs.py."""
    in_copy(copy, "-m", "tests.tools.recipe_runs", str(copy.parent), tokenizer_path)
    return copy.parent


@pytest.fixture(scope="module")
def remora(runs: Path) -> Path:
    """A run with the new operator, schedule, format of text, setting, metric, logger and event."""
    return runs / "remora"


@pytest.fixture(scope="module")
def rslora(runs: Path) -> Path:
    """A run with the new adapter and model family, which was resumed after step 5."""
    return runs / "rslora"


def test_every_recipe_has_an_example() -> None:
    recipes = set(re.findall(r"^### (.+)$", RECIPES, re.MULTILINE))
    assert recipes - {patch.recipe for patch in patches(CONTRIBUTING)} == WITHOUT_EXAMPLE


def test_recipes_name_code_that_exists() -> None:
    files = [path for room in ("relora_mora", "tests") for path in (ROOT / room).rglob("*.py")]
    words = {word for path in files for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    prose = re.sub(r"^```.*?^```$", "", RECIPES, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`(?:\w+\.)*(\w+)(?:\([^`]*\))?`", prose)
    assert len(named) > 80
    assert set(named) - words == set()


def test_an_example_that_is_out_of_date_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1\nb = 2\n")
    page = "### A setting\n\n```diff\n+++ a.py\n a = {}\n-b = 2\n+b = 3\n```\n"
    [patch] = patches(page.format(5))
    with pytest.raises(AssertionError, match=r"A setting: a\.py has these lines 0 times"):
        patch.apply(tmp_path)
    [patch] = patches(page.format(1))
    patch.apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "a = 1\nb = 3\n"


@distributed
def test_records_keep_the_contract_of_their_kind(copy: Path) -> None:
    in_copy(copy, "-m", "pytest", "-q", "-x", "tests/config/test_registry.py", "tests/adapters/test_every_adapter.py")


@distributed
def test_a_setting(remora: Path) -> None:
    assert logged_steps(remora) == [1, 2, 5, 10]  # log.first_steps is 2, log.every_steps is 5


@distributed
def test_an_operator(remora: Path) -> None:
    assert logged_values(remora, "merge/operator_before") == [99, 1]


@distributed
def test_a_schedule(remora: Path) -> None:
    rates = dict(zip(logged_steps(remora, "train/lr"), logged_values(remora, "train/lr"), strict=True))
    assert rates[2] == pytest.approx(2e-2)  # the end of the warmup
    assert rates[10] == pytest.approx(2e-2 * math.sqrt(2 / 10))


@distributed
def test_a_format_of_text(remora: Path) -> None:
    assert logged_values(remora, "train/documents")[-1] > 0
    assert "perf/data_bad_lines" not in metrics(remora)[-1]


@distributed
def test_a_metric(remora: Path) -> None:
    [last] = [line for line in metrics(remora) if line["step"] == 10 and "perf/steps_per_hour" in line]
    assert last["perf/steps_per_hour"] == pytest.approx(3600 / last["perf/step_seconds"])


@distributed
def test_a_periodic_event(remora: Path) -> None:
    assert logged_steps(remora, "train/norm") == [5, 10]
    assert min(logged_values(remora, "train/norm")) > 0


@distributed
def test_a_logger(remora: Path) -> None:
    lines = [line.split(",") for line in (remora / "metrics.csv").read_text().splitlines()]
    losses = [float(value) for _, name, value in lines if name == "train/loss"]
    assert losses == logged_values(remora)


@distributed
def test_a_method_and_a_model_family(rslora: Path) -> None:
    manifest = manifest_at(rslora, 10)
    assert manifest["config"]["method"]["name"] == "rslora"
    assert manifest["model_config"]["model_type"] == "helium"
    kinds = {key.split("|")[0] for key in tensors(checkpoint_at(rslora, 10)) if "lora_A" in key}
    assert kinds == {"master", "momentum"}
    assert logged_steps(rslora) == list(range(1, 11))
    losses = logged_values(rslora)
    assert losses[-1] < losses[0]


@distributed
def test_something_in_a_checkpoint(rslora: Path) -> None:
    for step in (5, 10):  # saved by the first start and by the resume
        assert manifest_at(rslora, step)["host"] == socket.gethostname()
