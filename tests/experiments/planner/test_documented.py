"""The table of plans in docs/clusters.md agrees with the output of its commands."""

import json

import pytest

from tests.tools.commands import PLAN, call
from tests.tools.each import each
from tests.tools.helpers import ROOT

HOSTS = ["--gpus_per_node=8", "--device=h100"]
MODEL = "--model.config=configs/model/llama_7b.json"


@pytest.mark.more
@each(
    "row,config,cluster",
    [
        ("| | ReMoRA | 1 | 6.3 | 0.518 |", "250m_remora", ["--nodes=1", "--gpus_per_node=8", "--device=a100"]),
        ("| 1.3b, 4 x 8 H100, 25 Gbit/s | full | 1 |", "1_3b_full", ["--nodes=4", *HOSTS, "--link_gbits=25"]),
        ("| 7b, 8 x 8 H100, 3,200 Gbit/s | full | 1 |", "1_3b_full", ["--nodes=8", *HOSTS, MODEL]),
        ("| | full | 2 | 47.1 |", "1_3b_full", ["--nodes=8", *HOSTS, MODEL]),
    ],
)
def test_a_row_is_what_the_planner_prints(
    monkeypatch: pytest.MonkeyPatch, row: str, config: str, cluster: list[str]
) -> None:
    monkeypatch.chdir(ROOT)
    table = (ROOT / "docs" / "clusters.md").read_text().partition("| model, cluster |")[2].splitlines()
    [line] = [line for line in table if line.startswith(row)]
    stage, needed, sent, seconds, *_ = (cell.strip() for cell in line.split("|")[3:])
    answer = call(PLAN, f"configs/run/paper_{config}.yaml", *cluster, f"--train.zero_stage={stage}", "--json=true")
    assert answer.code == 0, answer.err
    plan = json.loads(answer.out)
    memory, step = plan["memory"][stage], plan["steps"][stage]
    assert needed == f"{memory['device'] / 2**30:.1f}" + ("" if memory["fits"] else ", too large")
    if memory["fits"]:
        assert [float(sent), float(seconds)] == pytest.approx([step["sent"] / 1e9, step["seconds"]], rel=5e-3)
