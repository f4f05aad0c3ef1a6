"""launch/pretrain.py with a change, for scripts that a launcher starts."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

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
