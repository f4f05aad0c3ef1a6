"""The calls from ``pretrain()`` to the first step of a tiny run: ``python -m tests.tools.trace_start``.

Prints how many files of the package the main thread enters, how often a file of a lower room returns to one of an upper
room, and how often it calls back into one. A call from the same line to the same function counts once.
"""

import os
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from tests.test_structure import LAYER, PACKAGE
from tests.tools.runs import run_config, train, write_inputs
from tests.tools.tokenizer_tools import train_tokenizer

ROOT = f"{PACKAGE}/"


def layer(file: str) -> int:
    return LAYER.get(file.removeprefix(ROOT).partition("/")[0].removesuffix(".py"), 0)


def main() -> None:
    files: set[str] = set()
    calls: set[tuple[str, int, str, str]] = set()  # file and line of the caller, file and function that it calls

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code, caller = frame.f_code, frame.f_back
        if event != "call" or not code.co_filename.startswith(ROOT):
            return
        files.add(code.co_filename)
        while caller is not None and not caller.f_code.co_filename.startswith(ROOT):  # a library may be between
            caller = caller.f_back
        if caller is not None:
            calls.add((caller.f_code.co_filename, caller.f_lineno, code.co_filename, code.co_qualname))

    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(folder / "tokenizer")
        config = run_config(write_inputs(folder), str(folder / "tokenizer"), folder / "run")
        sys.setprofile(note)
        try:
            train(config, stop_after=0)
        finally:
            sys.setprofile(None)
    back = [caller for caller, _, called, _ in calls if layer(caller) < layer(called)]
    returns = [caller.removeprefix(ROOT) for caller, _, called, _ in calls if layer(caller) > layer(called)]
    print(f"{len(files)} files, {len(back)} calls back from a lower room into an upper one")
    of_train = [caller for caller in returns if caller.startswith("train/")]
    print(f"{len(returns)} returns to an upper room: {len(of_train)} to train/")


if __name__ == "__main__":
    main()
