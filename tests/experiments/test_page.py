"""The tables of docs/experiments.md: perplexities are those of the kept runs, and ratios follow from them."""

import math
import re
import tarfile
from dataclasses import dataclass, field
from statistics import mean

import pytest

from relora_mora.experiments.compare.groups import group_runs
from relora_mora.experiments.compare.runs import read_run, run_folders
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more

ARCHIVES = sorted((ROOT / "docs" / "studies").glob("*.tar.gz"))
TOGETHER = [{"tuned_tiny", "tuned_seeds_tiny"}]  # seeds of the same rows, on the same kind of machine
PERPLEXITY = re.compile(r"(?<![\d.])\d{3}\.\d(?![\d%])")


@dataclass
class Table:
    section: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def of_one_method(self, row: list[str]) -> list[set[str]]:
        """The row's perplexities, in sets that belong to one method: its columns by step and text, and each other."""
        steps = "(step )?[0-9,]+" if any(name.startswith("step ") for name in self.header) else ""
        together: set[str] = set()
        found = [together]
        for name, cell in zip(self.header, row, strict=True):
            numbers = set(PERPLEXITY.findall(cell)) if "not kept" not in cell else set()
            if name in ("C4", "c4like") or (steps and re.fullmatch(steps, name)):
                together |= numbers
            else:
                found.append(numbers)
        return [numbers for numbers in found if numbers]


def read_tables() -> list[Table]:
    tables: list[Table] = []
    section = before = ""
    for line in (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if line.startswith("#"):
            section = line.strip("# ")
        elif line.startswith("|") and not before.startswith("|"):
            tables.append(Table(section, cells))
        elif line.startswith("|") and not set(line) <= set("|-"):
            tables[-1].rows.append(cells)
        before = line
    return tables


TABLES = [table for table in read_tables() if any(map(table.of_one_method, table.rows))]
with_names = pytest.mark.parametrize("table", TABLES, ids=[f"{i}. {table.section}" for i, table in enumerate(TABLES)])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> list[set[str]]:
    """For each method in the kept studies, the perplexities of its seeds and their means, at every kept step."""
    folder = tmp_path_factory.mktemp("studies")
    for archive in ARCHIVES:
        with tarfile.open(archive) as stream:
            stream.extractall(folder / archive.name.removesuffix(".tar.gz"), filter="data")
    studies_kept = {path.name for path in folder.iterdir()}
    sources = [*TOGETHER, *({study} for study in studies_kept.difference(*TOGETHER))]
    found: list[set[str]] = []
    for studies in sources:
        runs = [read_run(run) for study in studies for run in run_folders(folder / study)]
        for group in group_runs(runs):
            values: set[str] = set()
            for name in group.runs[0].validation_sets:
                for losses in group.losses(name).to_numpy():
                    perplexities = list(map(math.exp, losses))
                    values.update(f"{value:.1f}" for value in [*perplexities, mean(perplexities)])
            found.append(values)
    return found


@with_names
def test_perplexities_are_those_of_kept_runs(table: Table, kept: list[set[str]]) -> None:
    for row in table.rows:
        for numbers in table.of_one_method(row):
            assert any(numbers <= of_method for of_method in kept), f"{sorted(numbers)} of {row}"
