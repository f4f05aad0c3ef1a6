"""The table of plans in docs/clusters.md agrees with the output of its commands."""

from __future__ import annotations

import json

import pytest

from tests.tools.commands import PLAN, call
from tests.tools.helpers import ROOT

HOSTS = ["--gpus_per_node=8", "--device=h100"]
CLUSTERS = {
    "250m, 1 x 8 A100 80 GB": ["--nodes=1", "--gpus_per_node=8", "--device=a100"],
    "1.3b, 4 x 8 H100, 25 Gbit/s": ["--nodes=4", *HOSTS, "--link_gbits=25"],
    "7b, 8 x 8 H100, 3,200 Gbit/s": ["--nodes=8", *HOSTS, "--model.config=configs/model/llama_7b.json"],
}


def rows() -> dict[tuple[str, str, str], list[str]]:
    """The columns after cluster, method and stage."""
    table = (ROOT / "docs" / "clusters.md").read_text().partition("| model, cluster |")[2].partition("\n\n")[0]
    found = {}
    cluster = ""
    for line in table.splitlines()[2:]:
        head, method, stage, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        cluster = head or cluster
        found[cluster, method, stage] = cells
    return found


@pytest.mark.more
@pytest.mark.parametrize(
    ("cluster", "method", "stage"),
    [
        ("250m, 1 x 8 A100 80 GB", "ReMoRA", "1"),
        ("1.3b, 4 x 8 H100, 25 Gbit/s", "full", "1"),
        ("7b, 8 x 8 H100, 3,200 Gbit/s", "full", "1"),
        ("7b, 8 x 8 H100, 3,200 Gbit/s", "full", "2"),
    ],
)
def test_a_row_is_what_the_planner_prints(
    monkeypatch: pytest.MonkeyPatch, cluster: str, method: str, stage: str
) -> None:
    monkeypatch.chdir(ROOT)
    size = "250m" if cluster.startswith("250m") else "1_3b"
    config = f"configs/run/paper_{size}_{method.lower()}.yaml"
    answer = call(PLAN, config, *CLUSTERS[cluster], f"--train.zero_stage={stage}", "--json=true")
    assert answer.code == 0, answer.err
    plan = json.loads(answer.out)
    needed, sent, seconds, *_ = rows()[cluster, method, stage]
    memory = plan["memory"][stage]
    assert needed == f"{memory['device'] / 2**30:.1f}" + ("" if memory["fits"] else ", too large")
    if memory["fits"]:
        assert float(sent) == pytest.approx(plan["steps"][stage]["sent"] / 1e9, rel=5e-3)
        assert float(seconds) == pytest.approx(plan["steps"][stage]["seconds"], rel=5e-3)
