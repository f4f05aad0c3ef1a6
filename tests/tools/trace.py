"""The files that a run goes through: ``python -m tests.tools.trace SETTINGS --SECTION.KEY=VALUE ...``.

Prints how many the main thread enters from ``pretrain()`` to the first step, and how many places another room returns
to; and, with data.workers=0, those that the first batch comes through. A call from a line to a function counts once.
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any


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
    files = {called for _, _, called, _ in calls}
    returns = Counter(caller for caller, _, called, _ in calls if caller.split("/")[0] != called.split("/")[0])
    start = "train/pretrain.py"
    entered = len({called for caller, _, called, _ in calls if caller == start} - {start})
    print(f"{len(files)} files; another room returns to {returns.total()} places")
    print(f"{start} itself enters {entered} files, and another room returns to {returns[start]} places in it")
    print(f"a batch comes through {len(batch)} files:", *sorted(batch))


if __name__ == "__main__":
    trace(*sys.argv[1:])
