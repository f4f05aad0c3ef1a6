"""Which faults of the past the tests would find today: ``python -m tests.power``.

``faults.yaml`` lists faults that commits of this repository fixed, each as a replacement that brings it back into the
code of today. Each one is put by itself into a temporary worktree, and the test that is known to find it runs there.
The exit code is 1 if a fault is not found any more.
"""

import argparse
import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from tests.tools.helpers import KERNELS, ROOT, wait_until, worktree

LIST = Path(__file__).with_name("faults.yaml")
LAYERS = ("test", "all", None)  # make test, longer targets only, no test
HANG_SECONDS = float(os.environ.get("HANG_SECONDS", "300"))  # for a test that is known to find a fault
LONGEST_SECONDS = 7200

Fault = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.power", description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", metavar="NAME", help="only this fault")
    parser.add_argument("--sample", metavar="N", type=int, help="N faults, drawn at random")
    parser.add_argument("--tests", metavar="ARGUMENTS", help="of pytest, instead of the test that found a fault before")
    options = parser.parse_args()
    faults = read_faults()
    wrong = [fault["name"] for fault in faults if occurrences(fault, ROOT) != 1]
    if wrong:
        raise SystemExit(f"{LIST}: change `find` to the code of today, or drop the fault: {', '.join(wrong)}")
    chosen = [
        fault for fault in faults if options.only in (None, fault["name"]) and (options.tests or fault["found_by"])
    ]
    if not chosen:
        raise SystemExit(f"--only={options.only}: no fault that a test finds has this name; {LIST} has the names")
    if options.sample is not None:
        chosen = random.sample(chosen, min(options.sample, len(chosen)))
    # every run of pytest is forked from this process, and importing this takes it longer than most of the tests
    import transformers.models.llama.modeling_llama  # noqa: F401

    lost = []
    with current() as checkout:
        given = shlex.split(options.tests or "")
        tests = given or ["-m", "", *dict.fromkeys(fault["found_by"] for fault in chosen)]
        if failure := first_failure(checkout, tests, LONGEST_SECONDS):
            raise SystemExit(f"failed without a fault: {failure}")
        for fault in chosen:
            found_by = find(checkout, fault, given or ["-m", "", fault["found_by"]])
            print(f"{fault['name']}: {found_by or 'not found'}", flush=True)
            if found_by is None:
                lost.append(fault["name"])
    print(f"{len(chosen)} faults, {len(lost)} of them lost")
    if lost:
        raise SystemExit(f"not found any more: {', '.join(lost)}; add a test, or find another one with --tests")


def read_faults() -> list[Fault]:
    faults: list[Fault] = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return faults


def occurrences(fault: Fault, checkout: Path) -> int:
    """How often the text to replace is in the file of a fault."""
    path = checkout / fault["file"]
    return path.read_text(encoding="utf-8").count(fault["find"]) if path.exists() else 0


@contextlib.contextmanager
def current() -> Iterator[Path]:
    """A checkout of the tracked files as they are now, also of changes that are not committed."""
    stash = subprocess.run(["git", "-C", ROOT, "stash", "create"], check=True, capture_output=True, text=True)
    with worktree(stash.stdout.strip() or "HEAD") as checkout:
        if (ROOT / KERNELS).exists():
            shutil.copy2(ROOT / KERNELS, checkout / KERNELS)
        yield checkout


def find(checkout: Path, fault: Fault, tests: list[str]) -> str | None:
    """The first test that fails with a fault; None if all of them pass."""
    path = checkout / fault["file"]
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(fault["find"], fault["replace"]), encoding="utf-8")
    try:
        return first_failure(checkout, tests, HANG_SECONDS)
    finally:
        path.write_text(before, encoding="utf-8")


def first_failure(checkout: Path, tests: list[str], seconds: float) -> str | None:
    """The first test that fails; of a run that hangs or crashes, what it said last. None if all tests pass."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = os.fork()
        if process == 0:
            run_tests(checkout, tests, log.fileno())
        try:
            status = wait_until(lambda: (ended := os.waitpid(process, os.WNOHANG))[0] and ended, seconds)[1]
            what = f"exit code {os.waitstatus_to_exitcode(status)}"
        except AssertionError as hang:
            status, what = None, str(hang)
        with contextlib.suppress(ProcessLookupError):  # what it has started, too
            os.killpg(process, signal.SIGKILL)
        log.seek(0)
        output = log.read()
    if what in ("exit code 4", "exit code 5"):  # a usage error, or no tests
        raise SystemExit(f"{output}\npytest did not run")
    named = re.findall(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", output, re.MULTILINE)
    return None if status == 0 else named[0] if named else f"{what}: {output[-300:]}"


def run_tests(checkout: Path, tests: list[str], log: int) -> NoReturn:
    """In a process that was forked: pytest on a checkout, none of whose modules are imported yet."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(checkout)
    os.environ["PYTHONPATH"] = str(checkout)
    sys.path[:] = [str(checkout), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.dont_write_bytecode = True  # a file with a fault may have the size and the second of the one before
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os._exit(pytest.main(["-x", "-vv", "-rfE", "-p", "no:cacheprovider", *tests]))


if __name__ == "__main__":
    main()
