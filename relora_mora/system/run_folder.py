"""The names of all files of a run folder, in one place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# in a line of starts.jsonl
NOTED = "began_with"  # digests of what settings name, by the setting
CHANGED = "changed"  # what counts and is not as in the checkpoint that was resumed, in words
CHANGES = "changes"  # in a record of a study, which has one line: those of all, as changes_since_first gives them


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, ``train.run_dir``; it need not exist yet. Properties stand in the order of writing."""

    path: Path

    @property
    def lock(self) -> Path:
        """Held by the first rank of the trainer that works here, see :class:`relora_mora.supervise.lock.RunLock`."""
        return self.path / "lock"

    @property
    def config(self) -> Path:
        """All settings of the newest start, as YAML."""
        return self.path / "config.yaml"

    @property
    def model_config(self) -> Path:
        """The model's config, as transformers reads it."""
        return self.path / "model.json"

    @property
    def tokenizer(self) -> Path:
        """A folder that ``AutoTokenizer`` loads."""
        return self.path / "tokenizer"

    @property
    def starts(self) -> Path:
        """One JSON object a line for every start: command, versions, commit."""
        return self.path / "starts.jsonl"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, each with ``step`` and tagged values."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """A folder with the metrics as TensorBoard reads them."""
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """The id of the run at Weights & Biases, which a resume continues."""
        return self.path / "wandb-id.txt"

    @property
    def tasks(self) -> Path:
        """One JSON object a line for every time that tasks were evaluated, as in ``metrics``."""
        return self.path / "tasks.jsonl"

    @property
    def checkpoints(self) -> Path:
        """A folder with the checkpoints, see :mod:`relora_mora.checkpoint.layout`."""
        return self.path / "checkpoints"

    @property
    def rollbacks(self) -> Path:
        """The rollbacks of the run, whose data a resume skips as well; as JSON."""
        return self.path / "rollbacks.json"

    def stacks(self, rank: int) -> Path:
        """Where each thread of a rank stood when it hung."""
        return self.path / f"stacks-of-rank-{rank}.txt"

    @property
    def ends(self) -> Path:
        """One JSON object a line for every end that was recorded: exit code, reason, step."""
        return self.path / "ends.jsonl"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of ``starts.jsonl``, ``metrics.jsonl`` or ``ends.jsonl``, oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def changes_since_first(starts: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[str]]]:
    """What later starts changed that counts, with the steps at which they did.

    The first start's changes are those since another run's checkpoint. A start takes back those of starts before it
    that began at its step or later: nothing that they trained has been kept.
    """
    found = {step: changed for start in starts[:1] for step, changed in start.get(CHANGES, ())}
    for start in starts[1:]:
        found = {step: changed for step, changed in found.items() if step < start["step"]}
        if start.get(CHANGED):
            found[start["step"]] = start[CHANGED]
    return list(found.items())


def noted_digests(starts: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What the newest of the starts that read weights noted; empty where none did. A resume reads none.

    Earlier versions noted those of settings of the model, without the section's name.
    """
    noted = [start[NOTED] for start in starts if NOTED in start]
    digests = noted[-1] if noted else {}
    return {name if "." in name else f"model.{name}": digest for name, digest in digests.items()}
