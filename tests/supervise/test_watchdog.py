"""The watchdog of one rank, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

BEATS = """
import datetime, faulthandler, gc, random, sys, threading, time
from pathlib import Path
from torch.distributed import TCPStore
from relora_mora.supervise.watchdog import Watchdog

faulthandler.dump_traceback_later(60, exit=True)  # of C: it also ends a process whose interpreter is locked
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
    """As ``sys._current_frames`` does in some versions of Python, where a garbage collection begins inside it.

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
watchdog = Watchdog(0, 1, 3.0, address=("127.0.0.1", store.port), job="test", end=found.append, stacks=Path(os.devnull))
watchdog.begin("a step")
watchdog.start()
print("up", flush=True)
sys.stdin.readline()
time.sleep(2 * watchdog._interval)
print([failure.reason for failure in found], flush=True)
os._exit(0)
"""


def test_a_job_that_was_suspended_goes_on():
    """All clocks stood still for it; what it did before counts on."""
    process = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)  # longer than it may stand still, and shorter than the timer in C
    process.send_signal(signal.SIGCONT)
    assert process.communicate("\n", timeout=60)[0] == "[]\n"
