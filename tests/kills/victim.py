"""launch/pretrain.py that writes what it is doing into a file and slows down at critical moments, so that a kill can be
aimed."""

import functools
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tools.changed_run import start

PHASES = Path(os.environ["VICTIM_PHASES"])
# a name of their own for semaphores, which tells what a victim leaves from what other processes use
multiprocessing.current_process()._config["semprefix"] = "/victim"  # type: ignore[attr-defined]


def say(phase: str) -> None:
    with PHASES.open("a") as stream:
        stream.write(f"{phase}\n")


def announced(owner: Any, name: str, phase: str, seconds: float = 0.0) -> None:
    """``owner.name`` says the phase when it begins, and waits in it on every rank."""
    whole: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(whole)
    def method(*args: Any, **kwargs: Any) -> Any:
        say(phase)
        time.sleep(seconds)
        return whole(*args, **kwargs)

    setattr(owner, name, method)


def announce_all() -> None:
    from relora_mora.checkpoint.writer import CheckpointWriter
    from relora_mora.engine.merging import Merger
    from relora_mora.train.loop.evaluating import Evaluating
    from relora_mora.train.loop.loop import Trainer

    say("start")
    announced(Trainer, "train_step", "step")
    announced(Evaluating, "evaluate", "evaluate")
    announced(Merger, "_reset_masters", "merge", 0.02)  # the base is written, the adapters are not yet reset
    announced(CheckpointWriter, "_write", "save", 0.02)
    announced(CheckpointWriter, "_commit", "commit", 0.02)
    announced(CheckpointWriter, "_tidy_up", "retire", 0.02)


if __name__ == "__main__":
    start(announce_all)
