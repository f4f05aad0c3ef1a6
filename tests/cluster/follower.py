"""launch/pretrain.py that writes down what each rank trains on: a line per step, [step, [hash of each sequence,
...]]."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from relora_mora.cli.command import run
from relora_mora.commands.pretrain import main


@functools.wraps(main)
def follower(*args: Any, **kwargs: Any) -> int:
    from relora_mora.train.loop.loop import Trainer

    whole = Trainer.train_step
    log = Path(f"{os.environ['FOLLOWED']}.{os.environ.get('RANK', '0')}-of-{os.environ.get('WORLD_SIZE', '1')}")

    def train_step(self: Any, share: Any) -> Any:
        batch = share.batch
        rows = zip(batch.input_ids.numpy(), batch.labels.numpy(), strict=True)
        hashes = [hashlib.sha256(ids.tobytes() + labels.tobytes()).hexdigest() for ids, labels in rows]
        with log.open("a") as stream:
            stream.write(json.dumps([self.state.step + 1, hashes]) + "\n")
        return whole(self, share)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    return main(*args, **kwargs)


if __name__ == "__main__":
    run(follower)
