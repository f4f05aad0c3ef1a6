"""Calls the command lines in this process, on disks that are full or read-only, as a user who may not do everything."""

import contextlib
import functools
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from relora_mora.cli.command import run
from relora_mora.commands import NAMES, main_of
from tests.tools.helpers import ROOT

NOBODY = 65534
EVALUATE = "evaluate"
EXPORT = "export"
PLAN = "plan"
PRETRAIN = "pretrain"
FINETUNE = "finetune"
BOARD = "board"
COMPARE = "compare"
TRAIN = "train-tokenizer"
TOKENIZE = "tokenize"


class Answer(NamedTuple):
    """The output of a command and its exit code."""

    code: int
    out: str
    err: str


@functools.cache
def module_of(command: str) -> ModuleType:
    """The module of a command of relora-mora, a module by its own name, or a script such as examples/uuid_pairs.py."""
    if command in NAMES:
        return sys.modules[main_of(command).__module__]
    if "/" not in command:
        return importlib.import_module(command)
    path = ROOT / command
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def call(command: str, *argv: object) -> Answer:
    """Runs a command or a script in this process. What is a fault of the program is raised here, as it would show a
    traceback."""
    return run_main(module_of(command).main, *argv)


def run_main(main: Callable[..., Any], *argv: object) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        run(main, [str(argument) for argument in argv])
    return Answer(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def refused(answer: Answer, *parts: str, notes: int = 0) -> None:
    """Exit code 2 and one message with all these parts (a line, or a heading and a line for each fault), after so many
    notes."""
    assert answer.code == 2, answer
    assert all(part in answer.err for part in parts), answer.err
    lines = answer.err.splitlines()[notes:]
    faults = re.match(r"(\d+) faults? in ", lines[0])
    assert len(lines) == (1 + int(faults[1]) if faults else 1), answer.err


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A separate small disk at ``folder``; the test is skipped if nothing can be mounted."""
    if shutil.which("mount") is None:
        pytest.skip("a disk cannot be mounted here: no mount command")
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def permissions_count() -> Iterator[None]:
    """Root may do everything: inside, this process is nobody. What it imports must have been imported before."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """A folder that everybody can read; pytest's folders are only for their owner."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def left_in(folder: Path) -> list[str]:
    """What is in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())
