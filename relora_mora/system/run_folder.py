"""The names of all files in a run folder, in one place."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# keys in a line of starts.jsonl
NOTED = "began_with"  # digests of the files that settings name, by setting
CHANGED = "changed"  # differences from the resumed checkpoint that affect the result, in words


class RunFile:
    """A file or folder with a fixed name in a :class:`RunFolder`; as an attribute of an instance, its path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: "RunFolder", _: "type[RunFolder]") -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, ``train.run_dir``; it need not exist yet. Files are in the order of writing."""

    path: Path

    @staticmethod
    def of(checkpoint: Path) -> "RunFolder":
        """The run that wrote a checkpoint into its folder. Each of these folders may be a link."""
        places = (Path(os.path.abspath(checkpoint)), checkpoint.resolve())  # noqa: PTH100 - resolve() follows links
        runs = [RunFolder(place.parent.parent) for place in places]
        return next((run for run in runs if run.config.is_file()), runs[0])

    lock = RunFile("lock")  # held by the first rank of the trainer that uses the folder (supervise.lock.RunLock)
    config = RunFile("config.yaml")  # all settings of the latest start
    model_config = RunFile("model.json")  # the model's config in transformers' format
    generation_config = RunFile("generation_config.json")  # of the base, if it has one
    tokenizer = RunFile("tokenizer")  # a folder that AutoTokenizer can load
    tokens = RunFile("tokens")  # a folder with the tokens of rows that are packed whole
    starts = RunFile("starts.jsonl")  # JSON lines, one per start: command, versions, commit
    metrics = RunFile("metrics.jsonl")  # JSON lines, each with `step` and tagged values
    tensorboard = RunFile("tensorboard")  # a folder with the metrics in TensorBoard's format
    wandb_id = RunFile("wandb-id.txt")  # the id of the run at Weights & Biases, which a resume continues
    tasks = RunFile("tasks.jsonl")  # JSON lines as in `metrics`, one per evaluation of tasks
    checkpoints = RunFile("checkpoints")  # a folder with the checkpoints, see relora_mora.checkpoint.layout
    ends = RunFile("ends.jsonl")  # JSON lines, one per recorded end of the run: exit code, reason, step

    def stacks(self, rank: int) -> Path:
        """The stack of each thread of a rank that hung."""
        return self.path / f"stacks-of-rank-{rank}.txt"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of ``starts.jsonl``, ``metrics.jsonl`` or ``ends.jsonl``, oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def noted_digests(starts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The digests noted by the latest start that read weights; empty if none did. A resume reads no weights."""
    return next((start[NOTED] for start in reversed(starts) if NOTED in start), {})
