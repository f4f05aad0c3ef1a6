"""The calls from ``pretrain()`` to the first step: ``python -m tests.tools.trace_start``.

Begins a tiny run in this process and prints the files of the package that its main thread enters, how
often a file of a lower room returns to one of an upper room, and how often it calls back into one. A call from the same
line to the same function counts once.
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


class Trace:
    """A profile function that notes which file calls which."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.returns: set[tuple[str, int, str]] = set()
        self.callbacks: set[tuple[str, int, str]] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        here = _file(frame)
        if event != "call" or here is None:
            return
        self.files.add(here)
        caller = frame.f_back
        while caller is not None and _file(caller) is None:  # a library may stand between
            caller = caller.f_back
        there = None if caller is None else _file(caller)
        if caller is None or there is None:
            return
        call = (there, caller.f_lineno, frame.f_code.co_qualname)
        if _layer(there) > _layer(here):
            self.returns.add(call)
        elif _layer(there) < _layer(here):
            self.callbacks.add(call)


def _file(frame: FrameType) -> str | None:
    name = frame.f_code.co_filename
    return name.removeprefix(f"{PACKAGE}/") if name.startswith(f"{PACKAGE}/") else None


def _layer(file: str) -> int:
    return LAYER.get(file.partition("/")[0].removesuffix(".py"), 0)


def main() -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    trace = Trace()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(folder / "tokenizer")
        config = run_config(write_inputs(folder), str(folder / "tokenizer"), folder / "run")
        sys.setprofile(trace)
        try:
            train(config, stop_after=0)
        finally:
            sys.setprofile(None)
    back = {call for call in trace.returns if call[0].startswith("train/")}
    main_file = {call for call in back if call[0] == "train/pretrain.py"}
    print(f"{len(trace.files)} files, {len(trace.callbacks)} calls back from a lower room into an upper one")
    print(f"{len(trace.returns)} returns to an upper room: {len(back)} to train/, {len(main_file)} to its pretrain.py")


if __name__ == "__main__":
    main()
