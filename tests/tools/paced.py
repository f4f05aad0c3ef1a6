"""launch/pretrain.py with a pause before each step, so that runs without an end leave the processors to other tests."""

from __future__ import annotations

import functools
import time
from typing import Any

from relora_mora.commands.pretrain import main, run_to_the_end

PAUSE_SECONDS = 0.05


@functools.wraps(main)
def paced(*args: Any, **kwargs: Any) -> int:
    from relora_mora.train.loop.loop import Trainer

    train_step = Trainer.train_step

    def after_a_pause(self: Trainer, share: Any) -> Any:
        time.sleep(PAUSE_SECONDS)
        return train_step(self, share)

    Trainer.train_step = after_a_pause  # type: ignore[method-assign]
    return main(*args, **kwargs)


if __name__ == "__main__":
    run_to_the_end(paced)
