"""The calls from ``pretrain()`` to the end of the first step: ``python -m tests.tools.trace_start``.

Trains a tiny run for one step in this process and prints the files of the package that its main thread enters; how
often a file of a lower room returns to one of an upper room, in all rooms and to the trainer; and how often a lower
room calls back into an upper one. A call from the same line to the same function counts once. ``--files`` lists the
files in the order of their first call.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from tests.test_structure import LAYER, PACKAGE
from tests.tools.runs import run_config, write_inputs
from tests.tools.tokenizer_tools import train_tokenizer


class Done(Exception):
    """The first step is done."""

    same_on_all_ranks = True


class Trace:
    """A profile function that notes which file calls which."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}  # in the order of their first call
        self.returns: set[tuple[str, int, str]] = set()
        self.callbacks: set[tuple[str, int, str]] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        here = self._file(frame)
        if event != "call" or here is None:
            return
        self.files.setdefault(here)
        caller = frame.f_back
        there = None
        while caller is not None and there is None:  # a library may stand between
            there = self._file(caller)
            line = caller.f_lineno
            caller = caller.f_back
        if there is None:
            return
        call = (there, line, frame.f_code.co_qualname)
        if self._layer(there) > self._layer(here):
            self.returns.add(call)
        elif self._layer(there) < self._layer(here):
            self.callbacks.add(call)

    @staticmethod
    def _file(frame: FrameType) -> str | None:
        name = frame.f_code.co_filename
        return name.removeprefix(f"{PACKAGE}/") if name.startswith(f"{PACKAGE}/") else None

    @staticmethod
    def _layer(file: str) -> int:
        return LAYER.get(file.partition("/")[0].removesuffix(".py"), 0)


def main() -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    from relora_mora.train.loop.loop import Trainer
    from relora_mora.train.pretrain import pretrain

    step = Trainer.train_step

    def first_step(self: Trainer, share: Any) -> Any:
        step(self, share)
        raise Done

    Trainer.train_step = first_step  # type: ignore[method-assign]
    trace = Trace()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(folder / "tokenizer")
        config = run_config(write_inputs(folder), str(folder / "tokenizer"), folder / "run")
        sys.setprofile(trace)
        try:
            pretrain(config)
        except Done:
            pass
        finally:
            sys.setprofile(None)
    rooms = {str(Path(file).parent) for file in trace.files}
    train = {file for file in trace.files if file.startswith("train/")}
    back = {call for call in trace.returns if call[0].startswith("train/")}
    print(f"{len(trace.files)} files of {len(rooms)} folders, {len(train)} of them in train/")
    print(f"{len(trace.returns)} returns from a lower room to an upper one, {len(back)} of them to train/")
    main_file = {call for call in back if call[0] == "train/pretrain.py"}
    print(f"{len(main_file)} returns to train/pretrain.py")
    print(f"{len(trace.callbacks)} calls back from a lower room into an upper one")
    if "--files" in sys.argv:
        print("\n".join(trace.files))


if __name__ == "__main__":
    main()
