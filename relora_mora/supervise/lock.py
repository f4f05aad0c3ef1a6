"""One trainer per run folder: its first rank holds ``RUN/lock``.

The lock is a lease, because flock works only between the processes of one host on some file systems, or not at all.
The file names the holder, who touches it every few seconds. Others take it if the holder's process on their host has
ended, or if they see no touch for a while. Modification times are only compared with each other, since clocks differ.
"""

from collections.abc import Callable
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from relora_mora.system.files import disk_faults_named, make_folder
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder

TOUCH_SECONDS = 5.0
STALE_SECONDS = 4 * TOUCH_SECONDS  # a holder that does not touch the file for so long is gone
WAIT_SECONDS = 30.0  # for the holder to end: ranks whose launcher was killed need up to ten seconds
DEAD_SECONDS = 1.0  # to see that a holder on this host has ended
POLL_SECONDS = 0.2


class LockError(ValueError):
    """Another trainer holds the run folder."""


class RunLock:
    """Held from :meth:`acquire` to :meth:`release` or the end of the process.

    ``on_loss(reason)`` is called once, in the lock's own thread, if the file is removed, names another holder, or
    cannot be touched (``refresh-failed``) for nearly as long as a holder may be silent.
    """

    def __init__(self, folder: Path, on_loss: Callable[[str], object] = lambda reason: None) -> None:
        self.path = RunFolder(folder).lock

        def lost(loss: LeaseCompromise) -> None:
            on_loss(loss.reason)

        self._lease = SoftFileLease(
            self.path,
            lease_duration=STALE_SECONDS,
            heartbeat_interval=TOUCH_SECONDS,
            on_compromise=lost,
            poll_interval=POLL_SECONDS,
            thread_local=False,
        )

    def acquire(self, wait_seconds: float = WAIT_SECONDS) -> str:
        """Takes the lock, waiting for another holder to end; returns the content of its file, which names this process.

        Raises :class:`LockError` if it is still held after ``wait_seconds``, and OSError if the folder cannot be
        written.
        """
        make_folder(self.path.parent)
        holder = self._lease.owner
        who = "unknown" if holder is None else f"host {holder.hostname}, pid {holder.pid}"
        with disk_faults_named(self.path.parent):
            try:
                self._lease.acquire(timeout=min(wait_seconds, DEAD_SECONDS))
            except Timeout:
                log.info("%s: waiting up to %.0f s for the end of its trainer (%s)", self.path, wait_seconds, who)
                try:
                    self._lease.acquire(timeout=wait_seconds)
                except Timeout as error:
                    raise LockError(
                        f"{self.path.parent}: another trainer works on this run ({who}); wait until it ends, stop it, "
                        "or use another train.run_dir"
                    ) from error
        return self.path.read_text(encoding="utf-8")

    def release(self) -> None:
        self._lease.release()
