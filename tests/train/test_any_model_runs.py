"""Whole runs of models of other families: as plain torch trains them, to the bit after a stop, and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from relora_mora.checkpoint.reader import CheckpointReader
from relora_mora.config.schema import Config
from relora_mora.model.config import plain_model_config
from relora_mora.weights.export import export, merged_model
from tests.grid.runs import compare
from tests.tools.any_model import any_config
from tests.tools.runs import Runs, checkpoint_at

STEPS = 6
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "gemma2": {"train": {"zero_stage": 3}, "model": {"activation_checkpointing": True}},
    "phi3": {"train": {"zero_stage": 1}},
    "mixtral": {"train": {"zero_stage": 3}, "method": {"train_experts": True}},
    "gpt2": {"train": {"zero_stage": 0}, "method": {"name": "full"}},
    "gpt_oss": {"train": {"zero_stage": 2}},
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind", ["gemma2", "phi3", *(pytest.param(k, marks=pytest.mark.more) for k in ("mixtral", "gpt2", "gpt_oss"))]
)
def test_a_run_trains_as_plain_torch_does_resumes_and_exports(
    runs: Runs, kind: str, pools: Any, ranks: int, tmp_path: Path
) -> None:
    world = min(2, ranks)
    file = tmp_path / "model.json"
    without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    file.write_text(json.dumps(plain_model_config(any_config(kind)) | {"vocab_size": 320} | without_dropout))
    sections = {"train": {}, "model": {}, **SETTINGS[kind]}
    sections["train"] = {**sections["train"], "steps": STEPS}
    sections["model"] = {**sections["model"], "config": str(file)}

    def make(run: Path, **changes: dict[str, Any]) -> Config:
        return runs.config(run, world, **sections, **changes)

    never = compare(make, pools, world, tmp_path, stop=3, rel=1e-4)
    export(never, tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    ours = merged_model(CheckpointReader(checkpoint_at(never, STEPS))).state_dict()
    assert [name for name, value in theirs.items() if not torch.equal(value, ours[name])] == []
