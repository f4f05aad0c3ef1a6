"""The watchdog of one rank, in its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

BEATS = """
import datetime, faulthandler, gc, random, sys, threading, time
from pathlib import Path
from torch.distributed import TCPStore
from relora_mora.supervise.watchdog import Watchdog

faulthandler.dump_traceback_later(60, exit=True)  # this timer in C also ends a process whose interpreter is locked
store = TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=20), wait_for_workers=False)
watchdog = Watchdog(0, 1, 60.0, address=("127.0.0.1", store.port), job="test", end=sys.exit, stacks=Path("stacks"))


class Node:
    pass


def garbage(cycles):
    for _ in range(cycles):
        node = Node()
        node.itself = node
        node.local = threading.local()
        node.local.value = 1


def at_depth(calls, action):
    return action() if calls == 0 else at_depth(calls - 1, action)


gc.set_threshold(50)
rng = random.Random(0)
action = watchdog.beat if sys.argv[1] == "beat" else sys._current_frames
for turn in range(3000):
    garbage(rng.randrange(60))
    if turn % 10 == 0:
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
    at_depth(rng.randrange(50), action)
print("done")
"""


def test_a_beat_cannot_lock_the_interpreter():
    """``sys._current_frames`` does in some versions of Python, if a garbage collection begins inside it.

    To see that, call BEATS with another argument.
    """
    done = subprocess.run(
        [sys.executable, "-c", BEATS, "beat"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


SUSPENDED = """
import datetime, os, signal, sys, time
from pathlib import Path
from torch.distributed import TCPStore
from relora_mora.supervise.watchdog import Watchdog

store = TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=20), wait_for_workers=False)
found = []


class Stopping:
    # a store during whose request this process is stopped

    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        return getattr(self.store, name)

    def multi_get(self, keys):
        first._store = self.store
        os.kill(os.getpid(), signal.SIGSTOP)
        return self.store.multi_get(keys)


def watchdog(rank):
    dog = Watchdog(
        rank, 2, 8.0, address=("127.0.0.1", store.port), job="test", end=found.append, stacks=Path(os.devnull)
    )
    dog.begin("a step")
    return dog


first, second = watchdog(0), watchdog(1)
first.start()
second.start()
while len(first._received) < 2:
    time.sleep(0.1)
if sys.argv[1] == "in a turn":
    first._store = Stopping(first._store)
else:
    os.kill(os.getpid(), signal.SIGSTOP)
sys.stdin.readline()
time.sleep(2 * first._interval)
print([failure.reason for failure in found], flush=True)
os._exit(0)
"""


@pytest.mark.stops
def test_a_suspended_job_continues():
    """All its clocks stop during that time and then continue."""
    command = [sys.executable, "-c", SUSPENDED]
    between_turns, in_a_turn = (
        subprocess.Popen([*command, when], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for when in ("between two turns", "in a turn")
    )
    for process in (between_turns, in_a_turn):
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    time.sleep(9)  # longer than the timeout, and shorter than the timer in C
    for process in (between_turns, in_a_turn):
        process.send_signal(signal.SIGCONT)
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    for process in (between_turns, in_a_turn):
        assert process.communicate(timeout=60)[0] == "[]\n"
