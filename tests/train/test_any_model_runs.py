"""Whole runs of models of other families: as plain torch trains them, to the bit after a stop, and exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from relora_mora.checkpoint.reader import CheckpointReader
from relora_mora.config.schema import Config
from relora_mora.model.config import LLAMA_FAMILY, plain_model_config
from relora_mora.weights.export import export, merged_model
from tests.grid.runs import compare
from tests.tools.any_model import KINDS, any_config
from tests.tools.grids import rest
from tests.tools.runs import Runs, checkpoint_at

STEPS = 6
RUNS = [*sorted({*KINDS, "gpt2"} - {*LLAMA_FAMILY}), "llama", "mistral", "qwen3"]  # qwen2 needs a tokenizer of Qwen's
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {  # of the others: ReMoRA, at each stage in turn
    "gemma2": {"train": {"zero_stage": 3}, "model": {"activation_checkpointing": True}},
    "phi3": {"train": {"zero_stage": 1}},
    "mixtral": {"train": {"zero_stage": 3}, "method": {"train_experts": True}},
    "gpt2": {"train": {"zero_stage": 0}, "method": {"name": "full"}},
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind", ["gemma2", "phi3", *rest(*((kind,) for kind in RUNS if kind not in ("gemma2", "phi3")))]
)
def test_a_run_trains_as_plain_torch_does_resumes_and_exports(
    runs: Runs, kind: str, pools: Any, ranks: int, tmp_path: Path
) -> None:
    world = min(2, ranks)
    file = tmp_path / "model.json"
    values = plain_model_config(any_config(kind))
    without_dropout = {key: 0.0 for key in values if key.endswith(("dropout", "pdrop", "drop"))}
    file.write_text(json.dumps(values | {"vocab_size": 320} | without_dropout))
    sections = {"train": {}, "model": {}, **SETTINGS.get(kind, {})}
    sections["train"] = {"zero_stage": RUNS.index(kind) % 4, **sections["train"], "steps": STEPS}
    sections["model"] = {**sections["model"], "config": str(file)}

    def make(run: Path, **changes: dict[str, Any]) -> Config:
        return runs.config(run, world, **sections, **changes)

    never = compare(make, pools, world, tmp_path, stop=3, rel=1e-4)
    export(never, tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    ours = merged_model(CheckpointReader(checkpoint_at(never, STEPS))).state_dict()
    assert [name for name, value in theirs.items() if not torch.equal(value, ours[name])] == []
