"""The lock of a run folder: one trainer at a time, on this host and on others."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from relora_mora.supervise.lock import STALE_SECONDS, LockError, RunLock
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


def test_a_held_lock_is_refused_and_names_its_holder(holder, tmp_path):
    with pytest.raises(LockError, match=rf"pid {holder.pid}.*use another train\.run_dir"):
        RunLock(tmp_path).acquire(wait_seconds=0.5)


def test_a_wait_is_announced(holder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("relora_mora.supervise.lock.TELL_SECONDS", 0.0)
    with caplog.at_level("INFO"), pytest.raises(LockError):
        RunLock(tmp_path).acquire(wait_seconds=0.5)
    assert [f"pid {holder.pid}" in record.getMessage() for record in caplog.records] == [True]


def test_a_lock_is_free_when_its_holder_was_killed(holder, tmp_path):
    holder.kill()
    holder.wait()
    lock = RunLock(tmp_path)
    before = lock.acquire(wait_seconds=60)
    assert before is not None
    assert f"pid {holder.pid}" in before
    lock.release()
    again = RunLock(tmp_path)
    assert again.acquire(wait_seconds=0.5) is None  # it was released, so there is no holder to report
    again.release()


@each("replaced", [False, True])
def test_a_holder_notices_that_its_file_was_removed_or_replaced(replaced, tmp_path, monkeypatch):
    """Otherwise it would remove checkpoints of another trainer that has started there."""
    monkeypatch.setattr("relora_mora.supervise.lock.TOUCH_SECONDS", 0.05)
    lost = threading.Event()
    lock = RunLock(tmp_path / "run", lost.set)
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
    other.release()


def test_a_lock_waits_for_its_holder_to_end(holder, tmp_path):
    assert holder.stdin
    holder.stdin.write("\n")
    holder.stdin.flush()
    lock = RunLock(tmp_path)
    assert lock.acquire(wait_seconds=60) is None
    lock.release()


def test_without_flock_a_holder_on_this_host_is_alive_while_it_touches_the_file(holder, tmp_path, monkeypatch):
    def no_flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    monkeypatch.setattr(time, "sleep", lambda _: os.utime(tmp_path / "lock"))
    with pytest.raises(LockError, match=f"pid {holder.pid}"):
        RunLock(tmp_path).acquire()


def _held_elsewhere(folder: Path) -> Path:
    path = folder / "lock"
    path.write_text(json.dumps({"host": "other", "host_id": "boot", "pid": 1, "since": "then", "released": False}))
    return path


def test_a_holder_that_lost_the_lock_notices_and_does_not_touch_the_file(tmp_path, monkeypatch):
    """It was suspended for a while, on a file system whose flock does not work across hosts."""
    monkeypatch.setattr("relora_mora.supervise.lock.TOUCH_SECONDS", 0.05)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    lost = threading.Event()
    first = RunLock(tmp_path, lost.set)
    first.acquire()
    second = RunLock(tmp_path)
    second.acquire()
    assert lost.wait(30)
    first.release()
    assert not json.loads(second.path.read_text())["released"]
    second.release()
    assert json.loads(second.path.read_text())["released"]


@each("lag_seconds", [0, 3600])
def test_a_holder_on_another_host_is_alive_while_it_touches_the_file(tmp_path, monkeypatch, lag_seconds):
    """Even if that host's clock lags this host's clock, or this one has jumped."""
    path = _held_elsewhere(tmp_path)

    def touch(seconds: float) -> None:
        there = time.time() - lag_seconds
        os.utime(path, (there, there))

    touch(0.0)
    monkeypatch.setattr(time, "sleep", touch)
    with pytest.raises(LockError, match="host other, pid 1"):
        RunLock(tmp_path).acquire()


def test_a_holder_on_another_host_that_touches_nothing_is_gone(tmp_path, monkeypatch):
    _held_elsewhere(tmp_path)
    now = time.monotonic()
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: now + sum(slept))
    lock = RunLock(tmp_path)
    assert "host other" in str(lock.acquire())
    lock.release()
    assert sum(slept) > STALE_SECONDS - 0.5
