"""What a run leaves in its folder."""

import math

import pytest

from relora_mora.system.run_folder import read_json_lines
from tests.tools.runs import metrics

pytestmark = pytest.mark.distributed


@pytest.mark.more
def test_a_run_is_documented_in_its_folder(runs, tmp_path):
    folder = tmp_path / "run"
    runs.train(folder, 2, log={"tensorboard": True}, checkpoint={"every_steps": 0})
    last = next(line for line in reversed(metrics(folder)) if "train/loss" in line)
    assert last["train/tokens"] == 10 * 8 * 32
    assert 0 < last["perf/mfu"] < 1
    assert last["train/perplexity"] == pytest.approx(math.exp(last["train/loss"]))
    for name in ("config.yaml", "model.json", "tokenizer/tokenizer.model", "checkpoints/latest", "tensorboard"):
        assert (folder / name).exists(), name
    [start] = read_json_lines(folder / "starts.jsonl")
    assert (start["world_size"], start["step"]) == (2, 0)
    assert "torch" in start["versions"]
