"""One run, read from its folder: settings, metrics over steps, tokens and time."""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from relora_mora.config.schema import SETTINGS
from relora_mora.config.yaml_text import parse_yaml
from relora_mora.experiments.compare.settings import SEEDS, compared_settings
from relora_mora.system.run_folder import CHANGED, RunFolder, noted_digests


class CompareError(ValueError):
    """A folder without a run, or runs with nothing in common; the message says what to give instead."""


TABLE = "compare.md"  # in that of a study or a comparison
NEEDED = {"method.name", "train.steps", "train.batch_size", "data.sequence_length"}


def _objects(content: bytes) -> list[dict[str, Any]]:
    """The JSON object of each line that has one; a kill may have truncated the last line."""
    objects = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            objects.append(json.loads(line))
    return [each for each in objects if isinstance(each, dict)]


@dataclass(frozen=True)
class Run:
    """One run. ``settings``: by dotted name, from the newest start; ``lines``: the lines of metrics.jsonl; ``starts``:
    those of starts.jsonl, or an empty one if it has none."""

    folder: Path
    settings: Mapping[str, Any]
    lines: list[dict[str, Any]]
    starts: list[dict[str, Any]]

    def series(self, tag: str) -> pd.Series:
        """A metric by step, only finite values; the newest value if a step has several.

        Of evaluations, only those count that scored the same as the last one, because a resume may have changed the
        held-out text.
        """
        lines = [line for line in self.lines if isinstance(line.get(tag), int | float)]
        if tag.startswith("eval/"):
            of_set = tag.rpartition("/")[0]
            scored = (f"{of_set}/tokens", f"{of_set}/digest")
            lines = [line for line in lines if all(line.get(key) == lines[-1].get(key) for key in scored)]
        values = {line["step"]: line[tag] for line in lines}
        return pd.Series({step: value for step, value in sorted(values.items()) if math.isfinite(value)}, dtype=float)

    @cached_property
    def compared(self) -> dict[str, Any]:
        """The settings that affect its numbers, without seeds, and with the precision that was chosen."""
        chosen = {True: "bf16", False: "fp32"}.get(self.noted("bf16"))
        return compared_settings({**self.settings, **({"train.precision": chosen} if chosen else {})})

    def noted(self, what: str) -> Any:
        """What the newest start noted; None if it did not."""
        return self.starts[-1].get(what)

    @property
    def seed(self) -> tuple[Any, ...]:
        return tuple(self.settings.get(name) for name in SEEDS)

    @property
    def last_step(self) -> int:
        return max(line["step"] for line in self.lines)

    @property
    def steps(self) -> int:
        return int(self.settings["train.steps"])

    @cached_property
    def is_finished(self) -> bool:
        return self.steps in self.series("eval/loss").index

    @property
    def validation_sets(self) -> list[str]:
        """Names of the held-out sets in the newest evaluation that have a finite loss, "" for a set without a name.

        A resume may have changed them.
        """
        tags: dict[str, Any] = next((line for line in reversed(self.lines) if "eval/loss" in line), {})
        sets = [tag.split("/")[1] for tag in tags if re.fullmatch("eval/[^/]*/loss", tag)]
        return [name for name in sets or [""] if not self.evaluations(name).empty]

    def evaluations(self, name: str) -> pd.Series:
        """Validation loss of a set by step, in nats per token."""
        return self.series(_tag(name, "loss"))

    def scored(self, name: str, what: str) -> Any:
        """The ``tokens`` or the ``digest`` of what the newest evaluation scored; not all kept runs have them."""
        tag = _tag(name, what)
        return next((line[tag] for line in reversed(self.lines) if tag in line), None)

    @property
    def began_with(self) -> dict[str, str]:
        """Digests of the files that settings name, by setting; empty if the run has not noted them.

        Held-out text, which a resume may change, is in ``scored`` instead.
        """
        return {name: digest for name, digest in noted_digests(self.starts).items() if name != "data.validation"}

    @property
    def history(self) -> list[tuple[int, list[str]]]:
        """The step at which it began, and (step, changes in words) for each resume that changed something relevant.

        It begins above 0 if it resumed another run's checkpoint. A start discards the changes of earlier starts that
        began at its own step or later, because nothing that they trained was kept.
        """
        changes: dict[int, list[str]] = {}
        for start in self.starts[1:]:
            changes = {step: changed for step, changed in changes.items() if step < start["step"]}
            if start.get(CHANGED):
                changes[start["step"]] = start[CHANGED]
        return [(self.starts[0].get("step", 0), []), *changes.items()]

    @cached_property
    def notes(self) -> dict[str, Any]:
        """What makes it another run than one with the same settings, by the setting that it belongs to."""
        scored = {name: self.scored(name, "digest") for name in self.validation_sets}
        noted = {"data.validation": scored} if any(scored.values()) else {}
        return {**self.began_with, **noted, "history": self.history}

    def tokens(self, steps: Any) -> NDArray[np.int64]:
        """Tokens trained on after these steps: [n] -> [n]"""
        known = pd.concat([pd.Series({0: 0.0}), self.series("train/tokens")])
        before = known.index.searchsorted(steps, side="right") - 1
        of_step = self.settings["train.batch_size"] * self.settings["data.sequence_length"]
        tokens = known.to_numpy()[before] + (np.asarray(steps) - known.index.to_numpy()[before]) * of_step
        return np.asarray(tokens, dtype=np.int64)


def _tag(of_set: str, metric: str) -> str:
    return f"eval/{of_set}/{metric}" if of_set else f"eval/{metric}"


def run_folders(path: Path) -> list[Path]:
    """The runs in the folder of a study, in the order in which they began; for any other folder, only itself."""
    configs = [] if RunFolder(path).config.is_file() else [RunFolder(run).config for run in path.glob("runs/*")]
    began = sorted((config.stat().st_mtime, config.parent) for config in configs if config.is_file())
    return [run for _, run in began] or [path]


def read_run(folder: Path) -> Run:
    """Reads a run folder; a trainer may still be writing to it.

    Raises :class:`CompareError` if it is not a run folder, or has no metrics yet.
    """
    files = RunFolder(folder)
    if not files.config.is_file():
        raise CompareError(
            f"{folder}: not a run folder, because it has no {files.config.name}; give the train.run_dir of a run"
        )
    metrics, starts = (_objects(path.read_bytes()) if path.is_file() else [] for path in (files.metrics, files.starts))
    lines = [line for line in metrics if "step" in line]
    if not lines:
        raise CompareError(
            f"{folder}: no metrics yet ({files.metrics.name}); leave it out, or wait for its first lines"
        )
    try:
        tree = parse_yaml(files.config.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise CompareError(f"{files.config}: cannot be read ({' '.join(str(error).split())})") from error
    sections = {name: keys for name, keys in tree.items() if isinstance(keys, dict)} if isinstance(tree, dict) else {}
    given = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    if not given.keys() >= NEEDED:
        raise CompareError(f"{files.config}: not the settings of a run; give the train.run_dir of a run")
    newer = {name: setting.get_default() for name, setting in SETTINGS.items() if not setting.is_required()}
    starts = starts or [{}]
    epochs = starts[-1].get("epochs")  # the config has them, and the fraction, converted to steps
    lengths = {"train.epochs": epochs, "optim.warmup_fraction": epochs and starts[-1].get("warmup_fraction")}
    return Run(folder, newer | given | lengths, lines, starts)
