"""What TensorBoard shows of a run: curves in an order for reading, the settings, and a table that compares runs."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from relora_mora.config import Config, parse_yaml, unused_settings

# TensorBoard sorts groups by name and opens the first two: eval and train, as all others come after them
_GROUPS = {
    "train/tokens": "training data/tokens",
    "train/epoch": "training data/epoch",
    "train/documents": "training data/documents",
    "perf/data_wait_seconds": "training speed/data_wait_seconds",
    "perf/data_": "training data/",
    "perf/": "training speed/",
    "eval/seconds": "training speed/evaluation_seconds",
    "startup/seconds": "training speed/startup_seconds",
    "merge/": "training merges/",
}
_OF_A_SET = re.compile("eval/[^/]+/[^/]+")  # a set of held-out text may be called "seconds"
# the same at every merge or evaluation, or a single number of a start: no curves
NO_CURVES = ("merge/layers", "merge/zeroed_elements", "merge/operator_before", "eval/tokens")
LAYOUT = {
    "quality": {
        "perplexity": ["Multiline", ["eval/(.+/)?perplexity$", "train/perplexity"]],
        "loss": ["Multiline", ["eval/(.+/)?loss$", "train/loss"]],
    },
    "merges, by projection": {
        "norm of what was merged": ["Multiline", ["training merges/delta_norm/.*"]],
        "its effective rank": ["Multiline", ["training merges/effective_rank/.*"]],
    },
}
_COMPARED = (
    "method.name",
    "method.rank",
    "method.merge_every",
    "optim.lr",
    "optim.lr_other",
    "train.batch_size",
    "train.seed",
)


def board_tag(tag: str) -> str | None:
    """The tag of a curve in TensorBoard, from its tag in metrics.jsonl; None for what is no curve."""
    if tag in NO_CURVES:
        return None
    if _OF_A_SET.fullmatch(tag):
        return None if tag.endswith("/tokens") else tag
    for prefix, group in _GROUPS.items():
        if tag.startswith(prefix):
            return group + tag.removeprefix(prefix)
    return None if tag.startswith("startup/") else tag


class TensorBoard:
    """Writes event files into a folder. What earlier files there hold from ``step`` on is hidden.

    The methods raise OSError, at once or at a later call, where the disk fails: a thread writes in the background.
    """

    def __init__(self, folder: Path, step: int) -> None:
        threading.excepthook = _without_disk_errors
        self._writer = SummaryWriter(str(folder), purge_step=step, flush_secs=10)

    def describe(self, settings: str) -> None:
        """Once a run: all settings (``config.yaml``) as text and some in the table of runs, and the custom charts."""
        indented = "".join(f"    {line}\n" for line in settings.splitlines())
        self._writer.add_text("run/config", indented, 0)
        self._writer.add_custom_scalars(LAYOUT)
        metrics = {"eval/perplexity": 0.0, "train/perplexity": 0.0}  # the table takes the newest points of these curves
        for summary in hparams(_compared(Config.model_validate(parse_yaml(settings))), metrics)[
            :2
        ]:  # without the third, the end of the run
            self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One point for every number, under the tag of metrics.jsonl."""
        for tag, value in values.items():
            shown = board_tag(tag)
            if shown is not None and isinstance(value, int | float):
                self._writer.add_scalar(shown, value, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()


def _compared(config: Config) -> dict[str, Any]:
    """The settings by which runs are compared, without those that the method does not use."""
    values = {name: attrgetter(name)(config) for name in set(_COMPARED) - set(unused_settings(config))}
    return {name: value for name, value in values.items() if value is not None}


def _without_disk_errors(args: threading.ExceptHookArgs) -> None:
    """The writing thread ends with an error of the disk; the next write meets it again and reports it."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)
