"""One trainer per run folder.

The first rank holds ``RUN/lock`` with ``flock``. The kernel releases it when the process ends in any way. But on some
file systems flock works only between the processes of one host, or not at all. So the file also names the holder, who
touches it every few seconds: if flock cannot tell, a holder is alive as long as the file's modification time changes.
"""

import contextlib
import fcntl
import functools
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relora_mora.system.files import disk_faults_named
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder

TOUCH_SECONDS = 5.0
STALE_SECONDS = 4 * TOUCH_SECONDS  # a holder that does not touch the file for so long is gone
WAIT_SECONDS = 30.0  # for the holder to end: ranks whose launcher was killed need up to ten seconds
TELL_SECONDS = 1.0  # a wait that takes longer is announced
POLL_SECONDS = 0.2


class LockError(ValueError):
    """Another trainer holds the run folder."""


class RunLock:
    """Held from :meth:`acquire` to :meth:`release` or the end of the process.

    ``on_loss`` is called once, in the lock's own thread, if the file is removed, or names another holder, while the
    lock is held: someone removed or moved the folder, or this process was not running for a while.
    """

    def __init__(self, folder: Path, on_loss: Callable[[], object] = lambda: None) -> None:
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
            has_flock = self._flock(handle, wait_seconds)
            before = _read(self.path)
            abandoned = bool(before) and not before.get("released")
            if abandoned and not (has_flock and before.get("host_id") == _host_id()):
                self._await_silence(handle, before)
            with disk_faults_named(self.path.parent):
                self._write(handle, released=False)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        # a thread that does nothing else, because a network file system may block it
        threading.Thread(target=self._touch, daemon=True, name="lock").start()
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
        if handle is not None and self._is_own():
            with contextlib.suppress(OSError):
                self._write(handle, released=True)

    def _is_own(self) -> bool:
        """Whether the file still names this holder; also if it cannot be read for the moment."""
        return bool(_read(self.path).get("token", self._token) == self._token)

    def _write(self, handle: int, *, released: bool) -> None:
        content = {
            "host": socket.gethostname(),
            "host_id": _host_id(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "token": self._token,
            "released": released,
        }
        data = (json.dumps(content) + "\n").encode()
        os.pwrite(handle, data, 0)
        os.ftruncate(handle, len(data))
        os.fsync(handle)

    def _touch(self) -> None:
        """Shows other hosts that the holder is alive, as long as the file is its own."""
        while not self._released.wait(TOUCH_SECONDS):
            try:
                if not self._is_own():
                    self._on_loss()
                    return
                os.utime(self.path)
            except FileNotFoundError:
                self._on_loss()
                return
            except OSError:  # the file system does not answer for the moment
                continue

    def _flock(self, handle: int, wait_seconds: float) -> bool:
        """Waits for the lock of the file; False if the file system has none."""
        deadline = time.monotonic() + wait_seconds
        tell = time.monotonic() + min(TELL_SECONDS, wait_seconds)
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                now = time.monotonic()
                if now > deadline:
                    raise self._held_by(_read(self.path)) from None
                if now > tell:
                    log.info(
                        "another trainer works on this run (%s): waiting %.0f s for its end",
                        _who(_read(self.path)),
                        deadline - now,
                    )
                    tell = math.inf
                time.sleep(POLL_SECONDS)
            except OSError:
                return False
            else:
                return True

    def _await_silence(self, handle: int, content: dict[str, Any]) -> None:
        """Raises LockError if the holder touches the file within the time in which a live one must.

        An old modification time proves nothing, because the clocks of hosts differ and can jump.
        """
        log.info("waiting %.0f s to see whether the previous trainer (%s) is alive", STALE_SECONDS, _who(content))
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


def _read(path: Path) -> dict[str, Any]:
    """The content of the file; empty if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@functools.cache
def _host_id() -> str:
    """Identifies this host since its boot. Its containers share it, and flock works between them."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text(encoding="ascii").strip() if boot.exists() else socket.gethostname()


def _who(content: dict[str, Any]) -> str:
    host, pid, since = (content.get(key, "unknown") for key in ("host", "pid", "since"))
    return f"host {host}, pid {pid}, since {since}"
