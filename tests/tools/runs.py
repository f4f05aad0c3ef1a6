"""Whole tiny runs of the trainer on generated text, for tests."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from relora_mora.checkpoint.layout import CheckpointError, step_folder
from relora_mora.config.load import validate
from relora_mora.config.schema import Config
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder, read_json_lines
from tests.tools.changed_run import before_each_step
from tests.tools.data_tools import write_shards
from tests.tools.pool import Pools

LLAMA = {
    "vocab_size": 320,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def write_inputs(folder: Path) -> Path:
    """Shards train-*.json.gz and validation-*.json.gz and the model's JSON."""
    for name, seed_shards, texts in (("train", 3, 60), ("validation", 1, 30)):
        write_shards(folder / name, seed_shards, texts)
    (folder / "model.json").write_text(json.dumps(LLAMA))
    return folder


def run_config(
    inputs: Path, tokenizer: str | None, run_dir: Path, world_size: int = 1, **sections: dict[str, Any]
) -> Config:
    """Ten steps with merges after 4 and 8, a checkpoint after each step; one or two ranks make two micro-batches."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"config": str(inputs / "model.json"), "compile": False},  # on a GPU most of the time of a tiny run
        "tokenizer": {"path": tokenizer},
        "data": {
            "train": str(inputs / "train" / "*.json.gz"),
            "validation": str(inputs / "validation" / "*.json.gz"),
            "sequence_length": 32,
            "workers": 0,
            "shuffle_documents": 8,
        },
        "method": {"name": "remora", "rank": 3, "operators": [1, 2], "merge_every": 4},
        "optim": {"lr": 2e-2, "lr_other": 1e-2, "warmup_steps": 2, "restart_warmup_steps": 2},
        "train": {"run_dir": str(run_dir), "steps": 10, "batch_size": 8, "precision": "fp32"},
        "eval": {"every_steps": 5, "max_tokens": 200},
        "checkpoint": {"every_steps": 1, "keep_last": 20},
        "log": {"every_steps": 1, "tensorboard": False, "progress": False, "peak_tflops": 1.0},
    }
    tree["train"]["micro_batch_size"] = 4 if world_size == 1 else 2
    for section, changes in sections.items():
        tree[section] |= changes
    return validate(tree, "the test", world_size=world_size)


class Stopped(Exception):
    """The run was cut off, as by a kill."""

    same_on_all_ranks = True


def train(
    config: Config, stop_after: int | None = None, watch: Callable[[Any, Any], object] = lambda trainer, share: None
) -> None:
    """Runs the trainer in this process (all ranks call it); with ``stop_after`` it is cut off after the save of that
    step. ``watch`` gets the trainer and this rank's batch before each step."""
    from relora_mora.train.loop.loop import Trainer
    from relora_mora.train.pretrain import pretrain

    def act(trainer: Trainer, share: Any) -> None:
        if trainer.state.step == stop_after:
            raise Stopped
        watch(trainer, share)

    with mock.patch.object(Trainer, "train_step", Trainer.train_step), contextlib.suppress(Stopped):
        before_each_step(act)
        pretrain(config)


def built(config: Config) -> Any:
    """Builds the run of these settings, with the state of its checkpoint if it resumes; all ranks call it."""
    from torch import distributed as dist

    from relora_mora.distributed.collectives import from_first_rank
    from relora_mora.train.begin import build
    from relora_mora.train.begin.inputs import agree, open_inputs
    from relora_mora.train.state.resume import checkpoint_at, resume, where_to_resume

    rank = dist.get_rank()
    found = agree(from_first_rank(lambda: open_inputs(config, dist.get_world_size())), config, rank)
    where = where_to_resume(config)
    if where is not None:
        found = replace(found, checkpoint=checkpoint_at(where, found, rank))
    run = build.build(found, rank)
    if found.checkpoint is not None:
        resume(run, found.checkpoint)
    return run


def opened(folder: Path, step: int, *, loggers: Sequence[Any] = ()) -> Any:
    """The metrics of a run that begins, or continues after a step."""
    from relora_mora.train.log.report import Metrics

    written = Metrics(folder, loggers)
    written.open(step)
    return written


def refusal_of(config: Config, error: type[ValueError] = CheckpointError) -> str:
    """Starts the trainer, which must raise this error; returns its message."""
    from relora_mora.train.pretrain import pretrain

    with pytest.raises(error) as caught:
        pretrain(config)
    return str(caught.value)


class Runs(NamedTuple):
    """Tiny runs of a test, which the ranks of its pools train."""

    pools: Pools
    inputs: Path
    tokenizer: str

    def config(self, folder: Path, world_size: int = 1, **sections: dict[str, Any]) -> Config:
        """See :func:`run_config`."""
        return run_config(self.inputs, self.tokenizer, folder, world_size, **sections)

    def train(self, folder: Path, ranks: int = 1, *, stop_after: int | None = None, **sections: dict[str, Any]) -> None:
        """See :func:`train`."""
        self.pools(ranks)(train, self.config(folder, ranks, **sections), stop_after=stop_after)

    def refusal(self, config: Config, error: type[ValueError] = CheckpointError) -> str:
        """See :func:`refusal_of`."""
        [message] = self.pools(1)(refusal_of, config, error)
        return str(message)


@contextlib.contextmanager
def log_lines(*levels: str, logger: logging.Logger = log) -> Iterator[list[str]]:
    """Collects the messages of these levels, such as "ERROR", that this process logs with the logger."""
    lines: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelname in levels:
            lines.append(record.getMessage())
        return True

    logger.addFilter(keep)
    try:
        yield lines
    finally:
        logger.removeFilter(keep)


def checkpoint_at(run_dir: Path, step: int) -> Path:
    """The folder of a run's checkpoint."""
    return RunFolder(run_dir).checkpoints / step_folder(step)


def manifest_at(run_dir: Path, step: int) -> dict[str, Any]:
    """The manifest of a run's checkpoint."""
    values: dict[str, Any] = json.loads((checkpoint_at(run_dir, step) / "manifest.json").read_text())
    return values


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its key."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(path)
    assert found, f"there are no tensors in {checkpoint}"
    return found


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return read_json_lines(RunFolder(run_dir).metrics)


def logged_values(run_dir: Path, name: str = "train/loss") -> list[Any]:
    """The numbers of a metric in the order of its lines."""
    return [line[name] for line in metrics(run_dir) if name in line]


def logged_steps(run_dir: Path, name: str = "train/loss") -> list[int]:
    """The steps of the lines that have a metric."""
    return [line["step"] for line in metrics(run_dir) if name in line]


def copy_cut_at(whole: Path, folder: Path, step: int) -> Path:
    """Copies a run that saved every step, as if it had been killed right after the save of this one."""
    later = [path.name for path in (whole / "checkpoints").glob("step-*") if path.name > step_folder(step)]
    return shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(*later))


def different_tensors(a: Path, b: Path) -> list[str]:
    """Keys of tensors that differ in any bit."""
    first, second = tensors(a), tensors(b)
    assert set(first) == set(second)
    assert first
    return [key for key in first if not torch.equal(first[key], second[key])]
