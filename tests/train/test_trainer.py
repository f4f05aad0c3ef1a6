"""Whole runs: five methods, warm start, export, evaluation, metrics, accumulation, faults of the user."""

from __future__ import annotations

import math
import shutil
from typing import Any
from unittest import mock

import pytest
import torch

from relora_mora.config.registry import METHODS
from relora_mora.system.run_folder import read_json_lines
from tests.tools.commands import PRETRAIN, call
from tests.tools.helpers import ROOT
from tests.tools.runs import logged_values, metrics, train

pytestmark = pytest.mark.distributed
UNSAVED: dict[str, dict[str, Any]] = {"checkpoint": {"every_steps": 0}}  # but at the end


@pytest.mark.more
def test_a_run_is_documented_in_its_folder(runs, tmp_path):
    folder = tmp_path / "run"
    runs.train(folder, 2, log={"tensorboard": True}, **UNSAVED)
    last = next(line for line in reversed(metrics(folder)) if "train/loss" in line)
    assert last["train/tokens"] == 10 * 8 * 32
    assert 0 < last["perf/mfu"] < 1
    assert last["train/perplexity"] == pytest.approx(math.exp(last["train/loss"]))
    for name in ("config.yaml", "model.json", "tokenizer/tokenizer.model", "checkpoints/latest", "tensorboard"):
        assert (folder / name).exists(), name
    [start] = read_json_lines(folder / "starts.jsonl")
    assert (start["world_size"], start["step"]) == (2, 0)
    assert "torch" in start["versions"]


def test_documents_can_be_kept_apart(runs, pools, tmp_path):
    losses = []
    for on in (False, True):
        folder = tmp_path / f"{on}"
        unscored = {"eval": {"every_steps": 0, "at_start": False}, **UNSAVED}
        config = runs.config(folder, data={"document_mask": on}, **unscored)
        pools(1)(train, config, stop_after=1)
        losses.append(logged_values(folder))
    assert len(losses[1]) == 1
    assert losses[0][0] != losses[1][0]
    assert losses[0] == pytest.approx(losses[1], abs=0.3)


@pytest.mark.more
@pytest.mark.parametrize("method", [*METHODS, "remora_paper"])
def test_every_tiny_config_trains_as_shipped(pools, inputs, tokenizer_path, tmp_path, method):
    """A few steps on other text, by the command that the README names."""
    arguments = [
        str(ROOT / "configs" / "run" / f"tiny_{method}.yaml"),
        f"--tokenizer.path={tokenizer_path}",
        f"--data.train={inputs}/train/*.json.gz",
        f"--data.validation={inputs}/validation/*.json.gz",
        f"--train.run_dir={tmp_path / 'run'}",
        "--train.steps=3",
        "--train.batch_size=4",
        "--train.micro_batch_size=2",
        "--data.sequence_length=32",
        "--data.workers=0",
        "--optim.warmup_steps=1",
        "--optim.restart_warmup_steps=1",
        "--method.merge_every=2",
        "--eval.max_tokens=200",
        "--log.every_steps=1",
    ]
    (answer,) = pools(1)(call, PRETRAIN, *arguments)
    assert answer.code == 0, answer
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "merge/layers" in line] == ([2] if method.startswith("re") else [])
    shutil.rmtree(tmp_path / "run")


def rates_of(config: Any) -> list[list[float]]:
    """The learning rates of each step, one for each parameter group."""
    from relora_mora.engine.engine import ZeroEngine

    step = ZeroEngine.step
    rates: list[list[float]] = []

    def noted(self: ZeroEngine, given: Any, loss: torch.Tensor) -> Any:
        rates.append(list(given))
        return step(self, given, loss)

    with mock.patch.object(ZeroEngine, "step", noted):
        train(config)
    return rates


def test_each_step_uses_the_rate_of_its_number(runs, pools, tmp_path):
    """Two steps of warmup, and for the adapters only, two more after the merges of steps 4 and 8."""
    optim = {"schedule": "constant", "rewarm": "adapters"}
    [rates] = pools(1)(rates_of, runs.config(tmp_path / "run", optim=optim, **UNSAVED))
    adapters = [0.01, 0.02, 0.02, 0.02, 0.01, 0.02, 0.02, 0.02, 0.01, 0.02]
    others = [0.005, *[0.01] * 9]
    assert rates == [[adapter, other, other] for adapter, other in zip(adapters, others, strict=True)]
    lines = [line for line in metrics(tmp_path / "run") if "train/lr" in line]
    assert [line["train/lr"] for line in lines] == adapters
    assert [line["train/lr_norms"] for line in lines] == [line["train/lr_embeddings"] for line in lines] == others
