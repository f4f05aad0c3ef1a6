"""One trainer per run folder.

The first rank holds ``RUN/lock`` with ``flock``. The kernel releases it when the process ends in any way. The file also
names the holder, who touches it every few seconds: on file systems where flock does not work across hosts, a
holder on another host counts as alive as long as the file's modification time changes. If the file is removed together
with its folder, the holder has lost the lock, and another trainer may start there.
"""

import contextlib
import fcntl
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relora_mora.system.files import disk_faults_named
from relora_mora.system.run_folder import RunFolder

TOUCH_SECONDS = 5.0
STALE_SECONDS = 4 * TOUCH_SECONDS  # a holder on another host is gone if it does not touch the file for so long
WAIT_SECONDS = 30.0  # for the holder to end: ranks whose launcher was killed need up to ten seconds
POLL_SECONDS = 0.2


class LockError(ValueError):
    """Another trainer holds the run folder."""


class RunLock:
    """Held from :meth:`acquire` to :meth:`release` or the end of the process.

    If the file is removed, replaced, or written by another holder while it is held, ``on_loss(who)`` is called once in
    the lock's own thread. ``who`` is the holder now, or None. Another trainer can only take the lock where flock does
    not work across hosts, and only from a holder that was not running for a while.
    """

    def __init__(self, folder: Path, on_loss: Callable[[str | None], object] = lambda who: None) -> None:
        self.path = RunFolder(folder).lock
        self._on_loss = on_loss
        self._handle: int | None = None
        self._token = uuid.uuid4().hex  # the file contains it as long as this object holds the lock
        self._released = threading.Event()

    def acquire(self, wait_seconds: float = WAIT_SECONDS) -> str | None:
        """Takes the lock, waiting for another holder to end.

        Returns the previous holder if it ended without releasing the lock, else None. Raises :class:`LockError` if the
        lock is still held after ``wait_seconds``, and OSError if the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._flock(handle, time.monotonic() + wait_seconds)
            before = _read(handle)
            abandoned = bool(before) and not before.get("released")
            if abandoned and before.get("host_id") != host_id():
                self._await_silence(handle, before)
            with disk_faults_named(self.path.parent):
                self._write(handle, released=False)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        # a thread that does nothing else, because a network file system may block it
        threading.Thread(target=self._touch, args=(handle, os.fstat(handle)), daemon=True, name="lock").start()
        return _who(before) if abandoned else None

    def release(self) -> None:
        self._released.set()
        self.say_released()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def say_released(self) -> None:
        """Writes that the holder has ended, which is about to happen. The lock itself is kept until then."""
        handle = self._handle
        if handle is not None and self._is_own(handle):
            with contextlib.suppress(OSError):
                self._write(handle, released=True)

    def _is_own(self, handle: int) -> bool:
        """Whether the file is still this holder's. It is if the file cannot be read for the moment."""
        return bool(_read(handle).get("token", self._token) == self._token)

    def _write(self, handle: int, *, released: bool) -> None:
        content = {
            "host": socket.gethostname(),
            "host_id": host_id(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "token": self._token,
            "released": released,
        }
        data = (json.dumps(content) + "\n").encode()
        os.pwrite(handle, data, 0)
        os.ftruncate(handle, len(data))
        os.fsync(handle)

    def _touch(self, handle: int, own: os.stat_result) -> None:
        """Shows other hosts that the holder is alive, as long as the file is its own."""
        while not self._released.wait(TOUCH_SECONDS):
            try:
                if not os.path.samestat(self.path.stat(), own) or not self._is_own(handle):
                    self._on_loss(self._present_holder())
                    return
                os.utime(self.path)
            except FileNotFoundError:
                self._on_loss(None)
                return
            except OSError:  # the file system does not answer for the moment
                continue

    def _present_holder(self) -> str | None:
        """The holder named in the file at the path now; None if that is a copy of this one's (RUN links to a copy)."""
        handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = _read(handle)
        finally:
            os.close(handle)
        return None if content.get("token") == self._token else _who(content)

    def _flock(self, handle: int, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise self._held_by(_read(handle)) from None
                time.sleep(POLL_SECONDS)
            except OSError:  # no flock on this file system: wait for a holder on this host, according to the file
                while (content := _read(handle)) and not content.get("released") and _runs_here(content):
                    if time.monotonic() > deadline:
                        raise self._held_by(content) from None
                    time.sleep(POLL_SECONDS)
                return
            else:
                return

    def _await_silence(self, handle: int, content: dict[str, Any]) -> None:
        """Raises LockError if a holder on another host touches the file within the time in which a live one must.

        An old modification time proves nothing, because the clocks of hosts differ and can jump.
        """
        touched = os.fstat(handle).st_mtime_ns
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            if os.fstat(handle).st_mtime_ns != touched:
                raise self._held_by(content)
            time.sleep(POLL_SECONDS)

    def _held_by(self, content: dict[str, Any]) -> LockError:
        return LockError(
            f"{self.path.parent}: another trainer works on this run ({_who(content)}); "
            "wait until it ends, stop it, or use another train.run_dir"
        )


def _read(handle: int) -> dict[str, Any]:
    """The content of the file; empty if it cannot be read."""
    try:
        content = json.loads(os.pread(handle, 1 << 16, 0))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@functools.cache
def host_id() -> str:
    """Identifies this host since its boot, and the PID namespace (container) of this process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        processes = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        boot = processes = ""
    return f"{socket.gethostname()}/{boot}/{processes}"


def _started(pid: int) -> int:
    """When a process began, in ticks since boot, which setting the clock does not change (proc_pid_stat(5), 22)."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])


def _runs_here(content: dict[str, Any]) -> bool:
    """Whether the process that wrote this still runs on this host."""
    try:
        started = _started(content["pid"])
    except (KeyError, ValueError, IndexError, OSError):
        return False
    return content.get("host_id") == host_id() and content.get("started") == started


def _who(content: dict[str, Any]) -> str:
    host, pid, since = (content.get(key, "unknown") for key in ("host", "pid", "since"))
    return f"host {host}, pid {pid}, since {since}"
