"""Losses, merges, resets, resumes and commands on one GPU and, if there are two, on two with NCCL: the same
tests with other ``pools``.

Run by ``make test-gpu``.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_mora.supervise.exits import USER_ERROR
from relora_mora.system.run_folder import RunFolder, read_json_lines
from tests.engine.test_resets import (
    test_a_merge_changes_only_what_it_should,
    test_the_base_is_exact_after_a_hundred_merges,
)
from tests.engine.test_resident import test_a_step_builds_each_weight_once_and_keeps_none_after_it
from tests.engine.test_stages import test_a_nan_on_one_rank_stops_the_step_on_all
from tests.grid.test_lora import test_a_lora_run_trains_as_plain_torch_does_and_resumes_to_the_bit
from tests.grid.test_mora import test_a_mora_run_trains_as_plain_torch_does_and_resumes_to_the_bit
from tests.tools.jobs import Job, write_config
from tests.tools.pool import Pools
from tests.tools.runs import checkpoint_at, logged_values, run_config, tensors, train
from tests.train.test_compiled import test_compiled_layers_train_like_others

DEVICE = os.environ.get("TEST_DEVICE", "cpu")


@pytest.fixture
def cpu_pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.mark.parametrize("method,others", [("full", "adamw"), ("remora", "adamw"), ("remora", "adamw8bit")])
def test_a_gpu_trains_as_a_cpu(
    method: str, others: str, pools: Pools, cpu_pools: Pools, inputs: Path, tokenizer_path: str, tmp_path: Path
) -> None:
    losses = []
    for where in (pools, cpu_pools):
        folder = tmp_path / str(len(losses))
        sections = {"method": {"name": method}, "optim": {"others": others}}
        where(1)(train, run_config(inputs, tokenizer_path, folder, **sections))
        losses.append(logged_values(folder))
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_default_settings_of_a_gpu_resume_bit_equal(
    pools: Pools, ranks: int, inputs: Path, tokenizer_path: str, tmp_path: Path
) -> None:
    """Compiled layers, which the other runs leave out, with attention inside documents by flash attention."""
    folders = [tmp_path / "never", tmp_path / "stopped"]
    for folder in folders:
        sections: dict[str, Any] = {
            "model": {"compile": "auto", "overrides": {"head_dim": 16}},
            "data": {"document_mask": True},
            "train": {"deterministic": True, "precision": "bf16"},
        }
        config = run_config(inputs, tokenizer_path, folder, ranks, **sections)
        if folder.name == "stopped":
            pools(ranks)(train, config, stop_after=4)
        pools(ranks)(train, config)
    first, second = (tensors(checkpoint_at(folder, 10)) for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_command_trains_on_every_gpu(inputs: Path, tokenizer_path: str, tmp_path: Path, ranks: int) -> None:
    config = run_config(inputs, tokenizer_path, tmp_path / "run", ranks, model={"compile": "auto"})
    job = Job(write_config(config, tmp_path / "run.yaml"), ranks=ranks, device=DEVICE)
    assert job.wait(300) == 0, job.output
    [start] = read_json_lines(RunFolder(tmp_path / "run").starts)
    assert start["world_size"] == ranks
    assert ("NVIDIA" in json.dumps(start)) == (DEVICE == "cuda")
