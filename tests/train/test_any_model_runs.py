"""Whole runs of models of other families: as plain torch trains them, to the bit after a stop, and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from relora_mora.model.config import plain_model_config
from relora_mora.weights.export import export, merged_model
from tests.grid.runs import trained
from tests.tools.any_model import any_config
from tests.tools.reference import PlainRun, model_config_of
from tests.tools.runs import Runs, checkpoint_at, copy_cut_at, different_tensors, logged_values, train

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

    def config(folder: str, **changes: Any) -> Any:
        sections = {name: dict(values) for name, values in SETTINGS[kind].items()}
        sections["model"] = {"config": str(file), **sections.get("model", {})}
        sections["train"] |= {"steps": STEPS}
        return runs.config(tmp_path / folder, world, **sections, **changes)

    never, resumed = tmp_path / "never", tmp_path / "resumed"
    shares = pools(world)(trained, config("never"), with_kernels=True)
    batches = [tuple(torch.cat(parts) for parts in zip(*each, strict=True)) for each in zip(*shares, strict=True)]
    losses = logged_values(never)
    assert losses == pytest.approx(PlainRun(config("never"), model_config_of(config("never"))).train(batches), rel=1e-4)
    copy_cut_at(never, resumed, 3)
    pools(world)(train, config("resumed", checkpoint={"every_steps": 0}))
    assert different_tensors(*(checkpoint_at(folder, STEPS) for folder in (never, resumed))) == []
    assert logged_values(resumed) == losses
    export(never, tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    ours = merged_model(checkpoint_at(never, STEPS)).state_dict()
    assert [name for name, value in theirs.items() if not torch.equal(value, ours[name])] == []
