"""The files of a run folder have names that users and scripts rely on."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_mora.system.run_folder import RunFile, RunFolder, read_json_lines

NAMES = {
    "lock": "lock",
    "config": "config.yaml",
    "model_config": "model.json",
    "generation_config": "generation_config.json",
    "tokenizer": "tokenizer",
    "tokens": "tokens",
    "starts": "starts.jsonl",
    "metrics": "metrics.jsonl",
    "tasks": "tasks.jsonl",
    "tensorboard": "tensorboard",
    "wandb_id": "wandb-id.txt",
    "checkpoints": "checkpoints",
    "ends": "ends.jsonl",
}


def test_the_names_do_not_change():
    files = {name for name, value in vars(RunFolder).items() if isinstance(value, RunFile)}
    assert {name: getattr(RunFolder(Path("runs/a")), name) for name in files} == {
        name: Path("runs/a", file) for name, file in NAMES.items()
    }
    assert RunFolder(Path("runs/a")).stacks(3) == Path("runs/a/stacks-of-rank-3.txt")


def test_json_lines_come_oldest_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "größe": "π"}\n', encoding="utf-8")
    assert read_json_lines(path) == [{"step": 1}, {"step": 2, "größe": "π"}]
    with pytest.raises(OSError, match=r"ends\.jsonl"):
        read_json_lines(RunFolder(tmp_path).ends)
