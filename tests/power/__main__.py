"""Which faults of the past the tests would find today: ``python -m tests.power``.

``faults.yaml`` lists faults that commits of this repository fixed, each as a replacement that brings it back into the
code of today. Each one is put by itself into a temporary worktree, and the test that is known to find it runs there.
The exit code is 1 if a fault is not found any more.
"""

import argparse
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.tools.helpers import KERNELS, ROOT, worktree

LIST = Path(__file__).with_name("faults.yaml")
LAYERS = ("test", "all", None)  # make test, longer targets only, no test
HANG_SECONDS = 300  # for a test that is known to find a fault
LONGEST_SECONDS = 7200
ANY_MARKER = ["-m", ""]  # also those that make test leaves out
MAKE_TEST = ["-n", "3", "--dist", "loadfile"]

Fault = dict[str, Any]


class Result(NamedTuple):
    passed: bool
    failed: list[str]  # node ids; of a run that hung or crashed, that of the test that was running
    output: str


def main() -> None:
    options = arguments()
    faults = read_faults()
    chosen = choose(faults, options)
    lost = []
    with current() as checkout:
        wrong = [fault["name"] for fault in faults if occurrences(fault, checkout) != 1]
        if wrong:
            raise SystemExit(f"{LIST}: change `find` to the code of today, or drop the fault: {', '.join(wrong)}")
        check_tests_pass(checkout, chosen, options)
        for fault in chosen:
            before = fault["found_by"]
            found_by = find(checkout, fault, options)
            print(f"{fault['name']}: {found_by or 'not found'}", flush=True)
            if before is not None and found_by is None:
                lost.append(fault["name"])
    print(f"{len(chosen)} faults, {len(lost)} of them lost")
    if lost:
        raise SystemExit(f"not found any more: {', '.join(lost)}; add a test, or find another one with --full")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.power", description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", metavar="NAME", help="only this fault")
    parser.add_argument("--sample", metavar="N", type=int, help="N faults, drawn at random")
    parser.add_argument("--seed", type=int, help="draws the same sample again")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tests", metavar="ARGUMENTS", help="of pytest, instead of the test that found a fault before")
    which.add_argument("--full", action="store_true", help="all of make test, if that test does not find a fault")
    return parser.parse_args()


def choose(faults: Sequence[Fault], options: argparse.Namespace) -> list[Fault]:
    chosen = [fault for fault in faults if options.only in (None, fault["name"])]
    if not chosen:
        raise SystemExit(f"--only={options.only}: no fault has this name; {LIST} has the names")
    if options.sample is None:
        return chosen
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print(f"--sample={options.sample} --seed={seed}")
    return random.Random(seed).sample(chosen, min(options.sample, len(chosen)))


def read_faults() -> list[Fault]:
    faults: list[Fault] = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return faults


def occurrences(fault: Fault, checkout: Path) -> int:
    """How often the text to replace is in the file of a fault."""
    path = checkout / fault["file"]
    return path.read_text(encoding="utf-8").count(fault["find"]) if path.exists() else 0


@contextmanager
def current() -> Iterator[Path]:
    """A checkout of the tracked files as they are now, also of changes that are not committed."""
    stash = subprocess.run(["git", "-C", ROOT, "stash", "create"], check=True, capture_output=True, text=True)
    with worktree(stash.stdout.strip() or "HEAD") as checkout:
        if (ROOT / KERNELS).exists():
            shutil.copy2(ROOT / KERNELS, checkout / KERNELS)
        yield checkout


def check_tests_pass(checkout: Path, faults: Sequence[Fault], options: argparse.Namespace) -> None:
    """Runs all tests that are to find faults once without a fault."""
    known = sorted({fault["found_by"] for fault in faults} - {None})
    tests = shlex.split(options.tests) if options.tests else MAKE_TEST if options.full else [*ANY_MARKER, *known]
    if not (options.tests or options.full or known):
        return
    result = run_tests(checkout, tests)
    if not result.passed:
        raise SystemExit(f"{result.output}\nfailed without a fault: {', '.join(result.failed) or shlex.join(tests)}")


def find(checkout: Path, fault: Fault, options: argparse.Namespace) -> str | None:
    """The first test that fails with a fault; None if all of them pass."""
    trials = [[*ANY_MARKER, fault["found_by"]]] if fault["found_by"] else []
    trials += [MAKE_TEST] if options.full else []
    path = checkout / fault["file"]
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(fault["find"], fault["replace"]), encoding="utf-8")
    try:
        for tests in [shlex.split(options.tests)] if options.tests else trials:
            result = run_tests(checkout, tests, HANG_SECONDS if fault["found_by"] in tests else LONGEST_SECONDS)
            if result.failed:
                return result.failed[0]
            if not result.passed:
                raise SystemExit(f"{result.output}\n{fault['name']}: pytest did not run")
    finally:
        path.write_text(before, encoding="utf-8")
    return None


def run_tests(checkout: Path, tests: Sequence[str], seconds: float = LONGEST_SECONDS) -> Result:
    """Runs pytest up to the first failure. A test that takes too long or crashes has failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-vv", "-rfE", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        output = log.read()
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", output, re.MULTILINE)
    if code != 0 and not failed:
        began = r"^(tests/\S+::(?!.* (?:PASSED|SKIPPED) ).*?) *(?:Fatal Python error.*)?$"  # named when it begins
        failed = re.findall(began, output, re.MULTILINE)[-1:]
    return Result(code == 0, failed, output[-5000:])


if __name__ == "__main__":
    main()
