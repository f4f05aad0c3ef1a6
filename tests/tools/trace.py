"""The files that a run goes through: ``python -m tests.tools.trace SETTINGS --SECTION.KEY=VALUE ...``.

Prints those that the main thread enters from ``pretrain()`` to the first step, with the number of places in an upper
room that a lower one returns to, and those that the first batch comes through, with data.workers=0. A call from the
same line to the same function counts once.
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

ROOMS = "system config distributed kernels cli supervise operators schedule tokenizer adapters data model optim sizing "
ROOMS += "engine library checkpoint weights evaluation train"  # from the lowest on


def trace(settings: str, *changes: str) -> None:
    import relora_mora.train.pretrain
    from relora_mora.config.load import load_config

    root = f"{Path(relora_mora.train.pretrain.__file__).parents[1]}/"
    calls: set[tuple[str, int, str, str]] = set()  # file and line of the caller, file and function that it calls
    batch: set[str] = set()  # files entered while the loop waits for its first batch
    waits = False

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal waits
        code, caller = frame.f_code, frame.f_back
        if not code.co_filename.startswith(root) or event not in ("call", "return"):
            return
        called = code.co_filename.removeprefix(root)
        if code.co_name == "next_batch":
            waits = event == "call"
        if event == "return":
            return
        if code.co_qualname == "Trainer.train_step":
            raise KeyboardInterrupt
        if waits:
            batch.add(called)
        while caller is not None and not caller.f_code.co_filename.startswith(root):  # a library may be between
            caller = caller.f_back
        if caller is not None:
            calls.add((caller.f_code.co_filename.removeprefix(root), caller.f_lineno, called, code.co_qualname))

    config = load_config(settings, dict(each.removeprefix("--").split("=", 1) for each in changes))
    sys.setprofile(note)
    try:
        relora_mora.train.pretrain.pretrain(config)
    except KeyboardInterrupt:
        sys.setprofile(None)
    rooms = ROOMS.split()
    level = {name: rooms.index(name.partition("/")[0].removesuffix(".py")) for _, _, name, _ in calls}
    returns = Counter(caller for caller, _, called, _ in calls if level.get(caller, 0) > level[called])
    back = sum(level.get(caller, len(rooms)) < level[called] for caller, _, called, _ in calls)
    print(
        f"{len(level)} files; {returns.total()} returns to an upper room, {returns['train/pretrain.py']} of them to "
        f"train/pretrain.py; {back} calls from a lower room into an upper one"
    )
    print(f"a batch comes through {len(batch)} files:", *sorted(batch))


if __name__ == "__main__":
    trace(*sys.argv[1:])
