"""The files of a run folder have names that users and scripts rely on."""

from pathlib import Path

from relora_mora.system.run_folder import RunFile, RunFolder


def test_the_names_do_not_change():
    names = {value.name for value in vars(RunFolder).values() if isinstance(value, RunFile)}
    assert names == {
        *("config.yaml", "model.json", "generation_config.json", "tokenizer", "tokens", "checkpoints", "tensorboard"),
        *("starts.jsonl", "metrics.jsonl", "tasks.jsonl", "ends.jsonl", "wandb-id.txt", "lock"),
    }
    assert RunFolder(Path("runs/a")).metrics == Path("runs/a/metrics.jsonl")
    assert RunFolder(Path("runs/a")).stacks(3) == Path("runs/a/stacks-of-rank-3.txt")
