"""The loggers that a run writes its metrics to, next to ``metrics.jsonl``: TensorBoard, Weights & Biases.

TensorBoard gets curves in a readable order, the settings, and a table that compares runs.
"""

import contextlib
import importlib.util
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from relora_mora.config.checks.combinations import unused_settings
from relora_mora.config.load import ConfigError, dump
from relora_mora.config.schema import Config, LogConfig
from relora_mora.config.yaml_text import parse_yaml
from relora_mora.system.files import without_disk_errors, write_synced
from relora_mora.system.logs import log
from relora_mora.system.process import run_with_timeout
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.log.report import Logger

ANSWER_SECONDS = 60.0  # how long to wait for the servers at a start
FINISH_SECONDS = 20.0  # to send the rest at the end, while other ranks wait for this one
STEP = "step"  # the x-axis of all other metrics


class WeightsAndBiases:
    """Logs to ``project``, which may be ENTITY/PROJECT. W&B's own environment variables decide everything else.

    The run folder keeps the id of the W&B run, which a resume continues; a run that starts again gets a new id. W&B
    cannot delete points, so steps that are repeated after a resume or a rollback have two each. If W&B cannot be
    reached at the start, the run is not logged there.
    """

    title = "Weights & Biases"

    def __init__(self, folder: Path, project: str) -> None:
        self._folder = folder
        self._files = RunFolder(folder)
        self._entity, _, self._project = project.rpartition("/")
        self._run: Any = None

    def open(self, step: int) -> None:
        if self._run is not None:  # after a rollback
            return
        import wandb

        path = self._files.wandb_id
        known = path.read_text(encoding="utf-8").strip() if step > 0 and path.exists() else None
        identifier = known or secrets.token_hex(8)
        write_synced(path, identifier + "\n")
        run = wandb.init(
            entity=self._entity or None,
            project=self._project,
            id=identifier,
            name=os.environ.get("WANDB_NAME", self._folder.resolve().name),
            dir=os.environ.get("WANDB_DIR", str(self._folder)),
            config=parse_yaml(self._files.config.read_text(encoding="utf-8")),
            resume="allow" if known else None,
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=ANSWER_SECONDS, login_timeout=int(ANSWER_SECONDS)
            ),
        )
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        target = f"in {Path(run.dir).parent}; wandb sync sends it" if run.offline else f"on {run.url}"
        log.info("%s: run %s %s", self.title, identifier, target)
        self._run = run

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            numbers = {tag: value for tag, value in values.items() if isinstance(value, int | float)}
            self._run.log({STEP: step, **numbers})

    def close(self) -> None:
        if self._run is not None:
            run_with_timeout(FINISH_SECONDS, self._run.finish)
            self._run = None


def check_loggers(config: LogConfig) -> None:
    """Raises :class:`ConfigError` if a package is missing. First rank only, since no other rank writes."""
    if config.wandb is None:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder named wandb, such as W&B itself creates, is not the package
        fault = (
            "log.wandb: the package wandb is not installed; pip install wandb, or pip install -e '.[wandb]' in the "
            "checkout, or set log.wandb=null"
        )
        raise ConfigError([fault], "the settings")


def make_loggers(folder: Path, config: LogConfig) -> list[Logger]:
    """Creates the loggers in the settings without opening them."""
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoard(folder))
    if config.wandb is not None:
        loggers.append(WeightsAndBiases(folder, config.wandb))
    return loggers


# TensorBoard sorts groups by name and opens the first two; these names make them eval and train
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
# not curves: the same number at every merge or evaluation
NO_CURVES = ("merge/layers", "merge/zeroed_elements", "merge/operator_before", "eval/tokens", "eval/answers")
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
    "method.operators",
    "method.merge_every",
    "method.merge_until_step",
    "method.reset",
    "optim.matrices",
    "optim.momentum",
    "optim.others",
    "optim.lr",
    "optim.lr_other",
    "optim.schedule",
    "optim.warmup_steps",
    "optim.restart_warmup_steps",
    "train.steps",
    "train.batch_size",
    "data.sequence_length",
    "model.config",
    "train.seed",
    "data.seed",
)
# TensorBoard treats the lowest and the highest of up to 21 values as outliers and leaves them out of a chart, which
# would hide the best of a few evaluations. Values that are written twice are shown. The evaluation of random weights is
# written once, since the other values could not be told apart in a chart with it.
_FEW = ("eval/", "merge/")
_EVENTS = "events.out.tfevents."  # prefix of an event file's name; the second of its creation follows, in ten digits
_COSTS = ("perf/tokens_per_second", "perf/peak_memory_gib", "train/tokens")


def board_tag(tag: str) -> str | None:
    """The TensorBoard tag for a tag of metrics.jsonl; None if it is not a curve."""
    if tag in NO_CURVES:
        return None
    if _OF_A_SET.fullmatch(tag):
        return None if tag.endswith(("/tokens", "/answers")) else tag
    for prefix, group in _GROUPS.items():
        if tag.startswith(prefix):
            return group + tag.removeprefix(prefix)
    return None if tag.startswith("startup/") else tag


class TensorBoard:
    """Writes event files to ``tensorboard/`` in a run folder.

    A background thread writes. If the disk fails, ``open`` and ``write`` raise OSError, perhaps only at a later call,
    and the next ``write`` begins a new file.
    """

    title = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._files = RunFolder(folder)
        self._writer: SummaryWriter | None = None
        self._begins_random = False

    def open(self, step: int) -> None:
        """Hides values after ``step`` in earlier files, and describes the run if no file does so yet.

        At step 0, earlier files are renamed; otherwise TensorBoard would show their settings and their values at 0.
        """
        self.close()
        board = self._files.tensorboard
        if step == 0:
            for file in board.glob("events.*"):
                # TensorBoard reads every file with "tfevents" in its name
                file.rename(file.with_name(f"abandoned-{file.name.replace('tfevents', 'events', 1)}"))
        is_new = step == 0 or not any(board.glob("events.*"))
        self._begin_file(step + 1)
        if is_new:
            config = Config.model_validate(parse_yaml(self._files.config.read_text(encoding="utf-8")))
            self._begins_random = step == 0 and config.model.init_from is None
            self._describe(config)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one point for every curve, or two if its tag is in ``_FEW``."""
        writer = self._writer or self._begin_file(step)  # None after a disk error
        try:
            for tag, value in values.items():
                shown = board_tag(tag)
                if shown is None or not isinstance(value, int | float):
                    continue
                is_outlier = step == 0 and self._begins_random
                for _ in range(2 if tag.startswith(_FEW) and not is_outlier else 1):
                    writer.add_scalar(shown, value, step)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None

    def _begin_file(self, step: int) -> SummaryWriter:
        threading.excepthook = without_disk_errors
        _put_before_now(self._files.tensorboard)
        self._writer = SummaryWriter(str(self._files.tensorboard), purge_step=step, flush_secs=10)
        return self._writer

    def _describe(self, config: Config) -> None:
        """Writes all settings as text, the settings for the table of runs, and the custom charts."""
        assert self._writer is not None
        indented = "".join(f"    {line}\n" for line in dump(config).splitlines())
        self._writer.add_text("run/config", indented, 0)
        self._writer.add_custom_scalars(LAYOUT)
        values = {name: attrgetter(name)(config) for name in _COMPARED}
        if config.optim.lr_other is None:
            values["optim.lr_other"] = config.optim.lr
        if config.model.config is None:
            values["model.config"] = config.model.init_from
        values = {
            name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()
        }
        sets = [f"eval/{name}/perplexity" for name in config.data.validation_sets if name]
        curves = ["eval/perplexity", "eval/loss", *sets, "train/perplexity", *map(str, map(board_tag, _COSTS))]
        results = dict.fromkeys(curves, 0.0)  # the table shows the newest point of each of these curves
        # TensorBoard takes the columns of all runs from the first run, so every method has all columns
        columns, _, _ = hparams(values, results)
        unused = unused_settings(config.by_name)
        used = {name: value for name, value in values.items() if name not in unused}
        _, start, _ = hparams(used, results)  # without the third summary, which marks the end of the run
        for summary in (columns, start):
            self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]


def _put_before_now(board: Path) -> None:
    """Renames files of the current second, or from a clock that was ahead, so that they sort before a new file.

    TensorBoard reads files in the order of their names, and a file can only hide steps of files read before it.
    """
    before = f"{_EVENTS}{int(time.time()) - 1:010d}"
    for file in board.glob(f"{_EVENTS}*"):
        if file.name >= before:
            file.rename(file.with_name(f"{before}.{file.name.removeprefix(_EVENTS)}"))
