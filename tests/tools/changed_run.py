"""launch/pretrain.py with a change, for scripts that a launcher starts.

Started itself, it makes a pause before each step, so that runs without an end leave the processors to other tests.
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # launchers start it from any folder
from relora_mora.commands.pretrain import main, run_to_the_end


def start(change: Callable[[], None]) -> NoReturn:
    """Makes the change before the trainer starts; it imports what it changes, as importing torch takes seconds."""

    @functools.wraps(main)
    def changed(*args: Any, **kwargs: Any) -> int:
        change()
        return main(*args, **kwargs)

    run_to_the_end(changed)


def before_each_step(act: Callable[[Any, Any], None]) -> None:
    """Has the trainer call ``act(trainer, share)`` before it trains on its share of a batch."""
    from relora_mora.train.loop.loop import Trainer

    whole = Trainer.train_step

    def train_step(self: Trainer, share: Any) -> Any:
        act(self, share)
        return whole(self, share)

    Trainer.train_step = train_step  # type: ignore[method-assign]


if __name__ == "__main__":
    start(lambda: before_each_step(lambda trainer, share: time.sleep(0.05)))
