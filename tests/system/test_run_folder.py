"""The files of a run folder have names that users and scripts rely on."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_mora.system.run_folder import RunFile, RunFolder, read_json_lines


def test_the_names_do_not_change():
    names = {value.name for value in vars(RunFolder).values() if isinstance(value, RunFile)}
    assert names == {
        *("config.yaml", "model.json", "generation_config.json", "tokenizer", "tokens", "checkpoints", "tensorboard"),
        *("starts.jsonl", "metrics.jsonl", "tasks.jsonl", "ends.jsonl", "wandb-id.txt", "lock"),
    }
    assert RunFolder(Path("runs/a")).metrics == Path("runs/a/metrics.jsonl")
    assert RunFolder(Path("runs/a")).stacks(3) == Path("runs/a/stacks-of-rank-3.txt")


def test_json_lines_come_oldest_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "größe": "π"}\n', encoding="utf-8")
    assert read_json_lines(path) == [{"step": 1}, {"step": 2, "größe": "π"}]
    with pytest.raises(OSError, match=r"ends\.jsonl"):
        read_json_lines(RunFolder(tmp_path).ends)
