"""The loggers that a run writes its metrics to, next to ``metrics.jsonl``: TensorBoard, Weights & Biases."""

import contextlib
import importlib.util
import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import LogConfig
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
        fault = "log.wandb: the package wandb is not installed; pip install 'relora_mora[wandb]', or set log.wandb=null"
        raise ConfigError([fault], "the settings")


def make_loggers(folder: Path, config: LogConfig) -> list[Logger]:
    """Creates the loggers in the settings without opening them."""
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoard(folder))
    if config.wandb is not None:
        loggers.append(WeightsAndBiases(folder, config.wandb))
    return loggers


class TensorBoard:
    """Writes event files to ``tensorboard/`` in a run folder.

    A background thread writes. If the disk fails, ``open`` and ``write`` raise OSError, perhaps only at a later call,
    and the next ``write`` begins a new file.
    """

    title = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._files = RunFolder(folder)
        self._writer: SummaryWriter | None = None

    def open(self, step: int) -> None:
        """Hides values after ``step`` in earlier files, all of them at step 0, and writes the settings of a new run."""
        self.close()
        writer = self._begin_file(step + 1 if step else 0)
        if step == 0:
            settings = self._files.config.read_text(encoding="utf-8").splitlines()
            writer.add_text("run/config", "".join(f"    {line}\n" for line in settings), 0)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one point for every number, under its tag."""
        writer = self._writer or self._begin_file(step)  # None after a disk error
        try:
            for tag, value in values.items():
                if isinstance(value, int | float):
                    writer.add_scalar(tag, value, step)
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
        self._writer = SummaryWriter(str(self._files.tensorboard), purge_step=step, flush_secs=10)
        return self._writer
