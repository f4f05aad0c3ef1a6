"""Runs with compiled layers train like those without, and compile everything before the first step."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from relora_mora.system.process import missing_to_compile
from tests.tools.grids import rest
from tests.tools.runs import metrics, train

pytestmark = [
    pytest.mark.more,
    pytest.mark.distributed,
    pytest.mark.skipif(
        missing_to_compile("C" if os.environ.get("TEST_DEVICE") == "cuda" else "C++") is not None,
        reason="torch.compile needs a compiler",
    ),
]


def compiled_graphs(config: Any) -> tuple[int, int]:
    """Trains, and counts the programs that torch.compile made: before the first step, and in all."""
    from torch._dynamo.utils import counters

    from relora_mora.train.begin.build import warm_up

    def programs() -> int:
        """Those of forward and backward, whether they were in the compiler's cache or not."""
        return sum(counters["inductor"][f"fxgraph_cache_{found}"] for found in ("hit", "miss", "bypass"))

    at_start = []
    torch._dynamo.reset()
    counters.clear()
    with mock.patch("relora_mora.train.pretrain.warm_up", lambda *args: at_start.append(warm_up(*args) or programs())):
        train(config)
    assert not counters["graph_break"], dict(counters["graph_break"])
    return at_start[0], programs()


def _losses(folder: Path) -> list[float]:
    """Losses of steps and evaluations."""
    lines = metrics(folder)
    of_sets = "eval/text/loss" if any("eval/text/loss" in line for line in lines) else "eval/loss"
    return [line[key] for line in lines for key in ("train/loss", of_sets) if key in line]


@pytest.mark.parametrize("method,stage", [("remora", 1), *rest(("full", 0))])
def test_compiled_layers_train_like_others(runs, pools, inputs, tmp_path, method, stage):
    sections: dict[str, Any] = {"method": {"name": method}, "train": {"zero_stage": stage}}
    if method == "full":  # a second kind of batches, less than a micro-batch of it
        few = tmp_path / "few.jsonl"
        few.write_text('{"prompt": "the rank", "completion": "matrix"}\n')
        sets = {"text": f"{inputs}/validation/*.json.gz", "few": [{"source": str(few), "records": {"kind": "prompt"}}]}
        sections["data"] = {"validation": sets}
    folders = [tmp_path / "plain", tmp_path / "compiled"]
    configs = [runs.config(folder, 1, model={"compile": folder.name == "compiled"}, **sections) for folder in folders]
    pools(1)(train, configs[0])
    [(at_start, at_end)] = pools(1)(compiled_graphs, configs[1])
    assert 0 < at_start == at_end  # no merge and no evaluation waits for a compiler
    plain, compiled = map(_losses, folders)
    assert len(plain) > 12
    assert compiled == pytest.approx(plain, rel=1e-5)
