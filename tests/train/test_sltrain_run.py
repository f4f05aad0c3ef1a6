"""Runs with SLTrain: its first weights, every ZeRO stage, resumes, and what a checkpoint holds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from relora_mora.adapters.sltrain import values_per_row
from relora_mora.checkpoint.reader import CheckpointReader
from relora_mora.experiments.spectrum import update_spectra
from relora_mora.model.llama import empty_model, initial_value
from relora_mora.weights.export import merged_weights
from tests.tools.grids import STAGES, rest
from tests.tools.runs import (
    LLAMA,
    assert_resumes_are_bit_equal,
    checkpoint_at,
    logged_values,
    manifest_at,
    refusal_of,
    run_config,
    train,
)

pytestmark = pytest.mark.distributed
DENSITY = 0.1
QUERIES = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def config(inputs, tokenizer_path):
    """The settings of a run with SLTrain in a folder."""

    def make(folder: Path, world_size: int = 2, **sections: dict[str, Any]) -> Any:
        method = {"name": "sltrain", "sparse_density": DENSITY} | sections.pop("method", {})
        sections["train"] = {"steps": 6} | sections.get("train", {})
        return run_config(inputs, tokenizer_path, folder, world_size, method=method, **sections)

    return make


# test_resume.py has AdamW at stage 2
CASES = [(3, "muon"), *rest((0, "adamw"), (1, "muon"))]


@pytest.mark.parametrize("stage,matrices", CASES)
def test_a_resume_is_bit_equal(pools, config, tmp_path, stage, matrices):
    sections = {"train": {"zero_stage": stage}, "optim": {"matrices": matrices}}
    assert_resumes_are_bit_equal(pools(2), partial(config, **sections), tmp_path)


def test_every_stage_trains_the_same(pools, config, tmp_path):
    losses = []
    for stage in STAGES:
        folder = tmp_path / f"stage{stage}"
        sections: dict[str, Any] = {"train": {"zero_stage": stage}, "optim": {"matrices": "muon"}}
        pools(2)(train, config(folder, checkpoint={"every_steps": 0}, **sections))
        losses.append(logged_values(folder))
    assert losses[0][-1] < losses[0][0] - 0.3
    for stage in STAGES[1:]:
        assert losses[stage] == pytest.approx(losses[0], rel=1e-5), stage


def test_a_checkpoint_holds_values_only_and_begins_sparse(pools, config, tmp_path):
    folder = tmp_path / "run"
    settings = config(folder, 1)
    pools(1)(train, settings, stop_after=2)
    manifest = manifest_at(folder, 2)
    row_values = values_per_row(DENSITY, LLAMA["hidden_size"])
    found = {name: shape for name, shape in manifest["parameters"].items() if name.startswith(QUERIES)}
    width = LLAMA["hidden_size"]
    assert found == {
        f"{QUERIES}.lora_A": [3, width],
        f"{QUERIES}.lora_B": [width, 3],
        f"{QUERIES}.sparse_values": [width, row_values],
    }
    assert {name.rpartition(".")[2] for name in manifest["frozen"]} == {"weight"}
    reader = CheckpointReader(checkpoint_at(folder, 2))
    base = reader.weight(f"{QUERIES}.weight")
    assert (base != 0).sum(1).tolist() == [row_values] * width
    merged = merged_weights(reader)[f"{QUERIES}.weight"]
    low_rank = reader.weight(f"{QUERIES}.lora_B") @ reader.weight(f"{QUERIES}.lora_A")
    sparse = merged - low_rank
    sparse[base == 0] = sparse[base == 0].round(decimals=6)
    assert torch.equal(sparse != 0, base != 0)
    moved = (sparse - base)[base != 0]
    assert (moved != 0).all()
    # the spectrum is about what the run changed, without the sparse matrix that it began with
    expected = torch.linalg.svdvals(merged - base)
    torch.testing.assert_close(update_spectra(folder)["q_proj"][1], expected)

    other = config(folder, 1, train={"seed": 1, "allow_changes": ["train.seed"]})
    [message] = pools(1)(refusal_of, other)
    assert "train.seed: 0 in the checkpoint, 1 now; it decides which elements of the sparse matrices train" in message


def test_after_a_start_at_full_rank_it_adds_to_the_trained_weights(pools, config, tmp_path):
    method = {"full_steps": 2}
    assert_resumes_are_bit_equal(pools(2), partial(config, method=method, train={"zero_stage": 3}), tmp_path)
    folder = tmp_path / "never"
    trained = CheckpointReader(checkpoint_at(folder, 2)).weight(f"{QUERIES}.weight")
    assert (trained != 0).all()
    last = CheckpointReader(checkpoint_at(folder, 6))
    assert torch.equal(last.weight(f"{QUERIES}.weight"), trained)
    assert (last.weight(f"{QUERIES}.sparse_values") != 0).all()
    # the run began with the weights that any run draws, and not with a sparse matrix
    drawn = initial_value(empty_model(LlamaConfig(**LLAMA)), f"{QUERIES}.weight", seed=0)
    expected = torch.linalg.svdvals(merged_weights(last)[f"{QUERIES}.weight"] - drawn)
    torch.testing.assert_close(update_spectra(folder)["q_proj"][1], expected)


def test_on_a_trained_model_it_begins_with_that_model(pools, config, tmp_path):
    trained = tmp_path / "trained"
    pools(2)(train, config(trained, checkpoint={"every_steps": 0}))
    tuned = tmp_path / "tuned"
    pools(2)(train, config(tuned, model={"init_from": str(trained)}), stop_after=1)
    before = logged_values(trained, "eval/loss")[-1]
    assert logged_values(tuned, "eval/loss")[0] == pytest.approx(before, abs=2e-5)
    base = CheckpointReader(checkpoint_at(tuned, 1)).weight(f"{QUERIES}.weight")
    weights = merged_weights(CheckpointReader(checkpoint_at(trained, 6)))
    torch.testing.assert_close(base, weights[f"{QUERIES}.weight"])
