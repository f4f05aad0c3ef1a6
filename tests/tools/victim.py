"""launch/pretrain.py whose rank 1 is lost at a moment that no signal can be aimed at; VICTIM names it."""

import errno
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from tests.tools.changed_run import before_each_step, start


def killed(*args: Any, **kwargs: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")


def killed_later(*args: Any, **kwargs: Any) -> NoReturn:
    time.sleep(2.0)  # until the other rank has written its part and waits
    killed()


def fail_with(error: Exception) -> None:
    def act(trainer: Any, share: Any) -> None:
        if trainer.state.step == 3:
            raise error

    before_each_step(act)


def lose_rank_1() -> None:
    from relora_mora.checkpoint.writer import CheckpointWriter
    from relora_mora.data.stream.stream import TrainStream
    from relora_mora.train import pretrain

    connect, next_batch, batches = torch.distributed.init_process_group, TrainStream.__next__, itertools.count()

    def connecting(*args: Any, **kwargs: Any) -> Any:
        """From now on the next connection kills the process: see tests/supervise/test_lost_moments.py."""
        Path(os.environ["CONNECTING"]).touch()
        return connect(*args, **kwargs)

    def without_text(stream: TrainStream) -> Any:
        if next(batches) == 3:
            raise OSError(errno.ESTALE, "Stale file handle", "part-1.json.gz")
        return next_batch(stream)

    if os.environ["VICTIM"] == "while it connects":
        pretrain.joined_within = lambda _: 10.0  # type: ignore[assignment]
    if os.environ["RANK"] == "1":
        match os.environ["VICTIM"]:
            case "while it connects":
                torch.distributed.init_process_group = connecting
            case "at the end":
                pretrain.leave_together = killed  # type: ignore[assignment]
            case "in a save":
                CheckpointWriter._write = killed_later  # type: ignore[method-assign]
            case "device":
                fail_with(torch.AcceleratorError("CUDA error: unspecified launch failure"))
            case "disk":
                fail_with(OSError(errno.ESTALE, "Stale file handle", "metrics.jsonl"))
            case "text":
                TrainStream.__next__ = without_text  # type: ignore[method-assign]


if __name__ == "__main__":
    start(lose_rank_1)
