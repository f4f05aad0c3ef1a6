"""The lock of a run folder: one trainer at a time, on this host and on others."""

import os
import subprocess
import sys
import threading
import time

import pytest

from relora_mora.supervise import lock as module
from relora_mora.supervise.lock import LockError, RunLock
from tests.tools.each import each

HOLD = """
import sys
from pathlib import Path
from relora_mora.supervise.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_held_lock_is_refused_and_names_its_holder(holder, tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.raises(LockError, match=rf"pid {holder.pid}.*use another train\.run_dir"):
        RunLock(tmp_path).acquire(wait_seconds=0.5)
    assert [f"pid {holder.pid}" in record.getMessage() for record in caplog.records] == [True], "the wait is announced"


def test_a_run_folder_may_be_a_link_to_a_folder_that_was_removed(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "scratch" / "run")
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    assert (tmp_path / "scratch" / "run" / "lock").exists()
    lock.release()


@pytest.mark.parametrize("killed", [True, False])
def test_a_lock_is_free_when_its_holder_has_ended(holder, tmp_path, killed):
    if killed:
        holder.kill()
        holder.wait()
    else:
        assert holder.stdin
        holder.stdin.write("\n")
        holder.stdin.flush()
    lock = RunLock(tmp_path)
    lock.acquire(wait_seconds=60)
    lock.release()
    assert not lock.path.exists()


@each("replaced", [False, True])
def test_a_holder_notices_that_its_file_was_removed_or_replaced(replaced, tmp_path, monkeypatch):
    """Otherwise it would remove checkpoints of another trainer that has started there."""
    monkeypatch.setattr(module, "TOUCH_SECONDS", 0.05)
    lost = threading.Event()
    lock = RunLock(tmp_path / "run", lambda reason: lost.set())
    other = RunLock(tmp_path / "other")
    lock.acquire()
    other.acquire()
    assert not lost.wait(0.3)
    if replaced:
        other.path.rename(lock.path)
    else:
        lock.path.unlink()
    assert lost.wait(60)
    lock.release()
    assert lock.path.exists() is replaced, "that of another trainer stays"
    other.release()


@each("lag_seconds", [3600, None])
def test_a_holder_on_another_host_is_alive_while_it_touches_the_file(tmp_path, monkeypatch, lag_seconds):
    """Even if that host's clock lags this host's clock. None: it touches nothing."""
    monkeypatch.setattr(module, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(module, "TOUCH_SECONDS", 0.1)
    path = tmp_path / "lock"
    path.write_text(f"filelock/2\npid=1\nhost=other\nmode=lease\ntoken={'0' * 32}\nduration=1.0\nstart=1\n")
    ended = threading.Event()

    def touch() -> None:
        while lag_seconds is not None and not ended.wait(0.1):
            there = time.time() - lag_seconds
            os.utime(path, (there, there))

    thread = threading.Thread(target=touch)
    thread.start()
    lock = RunLock(tmp_path)
    if lag_seconds is None:
        lock.acquire(wait_seconds=60)
        lock.release()
    else:
        with pytest.raises(LockError, match="host other, pid 1"):
            lock.acquire(wait_seconds=3)
    ended.set()
    thread.join()
