"""A copy of a run in an object store (``checkpoint.mirror``): a new machine goes on without the disk of the old one.

::

    URL/owner.json                      who trains: a token, host and process, and a beat that changes; gone at the end
    URL/manifests/step-00000200.json    the manifest of a checkpoint, written after its files
    URL/files/DIGEST                    the files of checkpoints by their xxh3-128, so that each is sent once
    URL/run/...                         the small files of the run folder, as they were at the newest checkpoint

A thread of the first rank looks for a new checkpoint on the disk and sends it. Training never waits for it: what fails
is sent again, and if the store is slow, only the newest checkpoint is sent. ``URL`` is a path, or that of any store
that fsspec knows; its login comes from the store's own means.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from relora_mora.checkpoint import layout
from relora_mora.system.files import link_or_copy, remove, sync, write_synced
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder

OWNER = "owner.json"
BEAT_SECONDS = 20.0
SILENCE_SECONDS = 3 * BEAT_SECONDS  # a trainer without a beat for so long has ended
FIRST_WAIT_SECONDS = 1.0  # before a fault is tried again; it doubles
LONGEST_WAIT_SECONDS = 60.0
CLOSE_SECONDS = 300.0  # for what is left to send at the end of the run
POLL_SECONDS = 0.5


class MirrorError(ValueError):
    """A mirror cannot be used. The message says what was found and what to do."""


class Mirror:
    """The mirror of the run in ``run``; first rank only.

    ``claim`` and ``fetch`` come first, in this order; ``newest`` needs neither. Then ``start`` begins to send what is
    saved, and ``close`` waits for what is left. The log has a line for each fault. Raises :class:`MirrorError` for a
    store that cannot be opened.
    """

    def __init__(self, url: str, run: RunFolder) -> None:
        self._run = run
        self._store = open_store(url)
        self._token = uuid.uuid4().hex
        # the run folder on this machine, of which ``RUN/lock`` lets one trainer work at a time
        self._folder = f"{socket.gethostname()}:{run.path.resolve()}"
        self._there: dict[str, layout.Manifest] = {}  # the manifests in the store by name
        self._elsewhere: set[str] = set()  # those that this disk did not have at the start
        self._sent = ("", 0)  # the checkpoint that was sent last: its name, and when its manifest was written
        self._lost = False  # another trainer has taken the mirror
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._sender = threading.Thread(target=self._send_all, daemon=True, name="mirror")
        self._pulse = threading.Thread(target=self._show_life, daemon=True, name="mirror beats")

    # ---- before training ---------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Takes the mirror. Raises :class:`MirrorError` if another trainer has it and lives, or if the store fails."""
        with _faults_named():
            before = self._owner()
            if before and before.get("folder") != self._folder:
                log.info("waiting %.0f s to see whether the mirror's trainer (%s) lives", SILENCE_SECONDS, _who(before))
                time.sleep(SILENCE_SECONDS)
                if self._owner() not in ({}, before):
                    raise MirrorError(
                        f"checkpoint.mirror: another trainer sends its checkpoints there ({_who(before)}); "
                        "wait until it ends, stop it, or give another checkpoint.mirror"
                    )
            self._beat()
            self._there = dict(self._manifests())

    def newest(self) -> list[layout.Manifest]:
        """The newest manifest in the store, if there is one. Raises :class:`MirrorError` if the store fails."""
        with _faults_named():
            return sorted(dict(self._manifests()).values(), key=lambda manifest: manifest.step)[-1:]

    def fetch(self, resume: str = "auto") -> int | None:
        """Fetches the newest checkpoint if the run folder has none; returns its step, or None if it fetched nothing.

        With it come the best one and the one to go back to. A damaged checkpoint is passed over. Raises
        :class:`MirrorError` if the store has a later step than a run folder with checkpoints, or another run, if no
        checkpoint in it is whole, if ``resume`` (``train.resume``) says that the run begins elsewhere, and if the store
        fails.
        """
        own = layout.list_checkpoints(self._run.checkpoints)
        there = sorted(self._there.values(), key=lambda manifest: manifest.step, reverse=True)
        if own and there and self._is_of_another_run():
            raise MirrorError(
                f"checkpoint.mirror: it holds checkpoints of another run than {self._run.path}, which would be removed "
                "there; give another checkpoint.mirror"
            )
        if own and there and there[0].step > (layout.step_of(own[0]) or 0):
            raise MirrorError(
                f"checkpoint.mirror: it is at step {there[0].step}, and {own[0]} is the newest here; move the run "
                "folder away to go on from the mirror, or give another checkpoint.mirror"
            )
        if own or not there:
            return None
        began = there[0].config.get("train", {}).get("resume")  # of the start that saved the newest one
        if resume == "never" or resume not in ("auto", began):
            raise MirrorError(
                f"checkpoint.mirror: it holds checkpoints up to step {there[0].step}, and train.resume={resume}; "
                "train.resume=auto continues from them, or give another checkpoint.mirror"
            )
        fetched: list[Path] = []  # the newest first
        best: int | None = None
        good = False
        for manifest in there:
            if fetched and manifest.step != best and (good or not manifest.is_good):
                continue
            try:
                with _faults_named():
                    work = self._fetch(manifest)
            except layout.CheckpointError as error:
                log.warning("passed over a checkpoint of the mirror: %s", error)
                continue
            if not fetched:
                best = (manifest.counters.get("best") or {}).get("step")
            fetched.append(work)
            good = good or manifest.is_good
        if not fetched:
            raise MirrorError(
                "checkpoint.mirror: no checkpoint in it is whole; give another checkpoint.mirror to start again"
            )
        with _faults_named():
            self._fetch_small_files()
        for work in fetched:
            work.rename(work.with_name(work.name.partition(".")[0]))
        sync(self._run.checkpoints)
        return layout.step_of(layout.list_checkpoints(self._run.checkpoints)[0])

    def _is_of_another_run(self) -> bool:
        """Whether the first start that the store has recorded is not that of the run folder."""
        with _faults_named(), contextlib.suppress(FileNotFoundError):
            name = self._run.starts.relative_to(self._run.path)
            theirs, ours = self._store.cat_file(f"run/{name}"), self._run.starts.read_bytes()
            return bool(theirs.partition(b"\n")[0] != ours.partition(b"\n")[0])
        return False

    def _fetch(self, manifest: layout.Manifest) -> Path:
        """Fetches a checkpoint into a folder that does not count yet.

        Raises :class:`CheckpointError` if a file is not as listed.
        """
        final = self._run.checkpoints / layout.step_folder(manifest.step)
        size = sum(entry.bytes for entry in manifest.files.values())
        log.info("fetching %s from the mirror (%.1f MB)", final.name, size / 1e6)
        work = final.with_name(f"{final.name}.fetched{layout.TEMPORARY}")
        remove(work)
        for name, entry in manifest.files.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # damage, which is found below
                self._store.get_file(f"files/{entry.xxh3_128}", str(work / name))
        layout.check_files(work, manifest, manifest.files)
        write_synced(work / layout.MANIFEST, manifest.dump())
        return work

    def _fetch_small_files(self) -> None:
        for path in self._small_files():
            with contextlib.suppress(FileNotFoundError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._store.get_file(f"run/{path.relative_to(self._run.path)}", str(path))

    # ---- while it trains -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to send, first what the store lacks."""
        self._elsewhere = self._there.keys() - self._on_disk()
        self._sender.start()
        self._pulse.start()

    def close(self, *, wait: bool = True) -> None:
        """Waits for what is left to send, and gives the mirror free; without ``wait`` the thread does so by itself."""
        self._closing.set()
        self._sender.join(CLOSE_SECONDS if wait else 0)
        if wait and self._sender.is_alive():
            log.warning("checkpoint.mirror: the last checkpoint was not sent in time; the same command sends it")

    # ---- the threads -----------------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        wait = FIRST_WAIT_SECONDS
        while not self._lost:
            is_last = self._closing.is_set()  # asked first: what is complete by now is still sent
            try:
                self._send_newest()
                if is_last:
                    self._ended.set()
                    self._pulse.join()  # else it could write the owner again
                    if self._is_ours():
                        self._store.rm_file(OWNER)
                    return
                wait = FIRST_WAIT_SECONDS
                self._closing.wait(POLL_SECONDS)
            except Exception as error:  # stores raise types of their own
                fault = _reason(error)
                log.warning("checkpoint.mirror: %s; training goes on, and it is tried again in %.0f s", fault, wait)
                time.sleep(wait)
                wait = min(LONGEST_WAIT_SECONDS, 2 * wait)

    def _show_life(self) -> None:
        while not self._ended.wait(BEAT_SECONDS) and not self._lost:
            with contextlib.suppress(Exception):  # the store is away for a moment; what cannot be sent is reported
                if self._is_ours():
                    self._beat()

    def _is_ours(self) -> bool:
        """Whether no other trainer has taken the mirror."""
        owner = self._owner()
        if owner.get("token", self._token) != self._token and not self._lost:
            self._lost = True
            log.warning("checkpoint.mirror: another trainer has taken it (%s); nothing more is sent", _who(owner))
        return not self._lost

    def _send_newest(self) -> None:
        """Sends the newest checkpoint if that has changed. Links keep its files even if it is removed meanwhile."""
        checkpoint = next(iter(layout.list_checkpoints(self._run.checkpoints)), None)
        if checkpoint is None:
            return
        identity = checkpoint.name, (checkpoint / layout.MANIFEST).stat().st_mtime_ns  # a rollback makes a step again
        if identity == self._sent:
            return
        links = checkpoint.with_name(f"{checkpoint.name}.mirror{layout.TEMPORARY}")
        remove(links)
        try:
            shutil.copytree(checkpoint, links, copy_function=link_or_copy)
            self._send(links)
            self._sent = identity
        finally:
            remove(links)

    def _send(self, links: Path) -> None:
        """Sends the files that the store lacks, then the manifest, and removes what is gone from the disk."""
        manifest = layout.read_manifest(links)
        for name, entry in manifest.files.items():
            self._put(links / name, f"files/{entry.xxh3_128}", entry.bytes)
        if not self._is_ours():
            return
        for path in self._small_files():
            if path.exists():
                self._store.pipe_file(f"run/{path.relative_to(self._run.path)}", path.read_bytes())
        name = layout.step_folder(manifest.step)
        self._store.pipe_file(f"manifests/{name}.json", manifest.dump().encode())
        self._there[name] = manifest
        self._retire(manifest)

    def _retire(self, newest: layout.Manifest) -> None:
        """Removes checkpoints that are not on the disk any more, and files that no checkpoint has.

        What an earlier machine kept for ``checkpoint.keep_every_steps`` stays.
        """
        every = newest.config.get("checkpoint", {}).get("keep_every_steps", 0)
        keep = {layout.step_folder(newest.step), *self._on_disk()}
        for name in self._elsewhere & set(self._there):
            step = self._there[name].step
            if every > 0 and step % every == 0 and step < newest.step:
                keep.add(name)
        for name in set(self._there) - keep:
            self._store.rm_file(f"manifests/{name}.json")
            del self._there[name]
        used = {entry.xxh3_128 for manifest in self._there.values() for entry in manifest.files.values()}
        for path in self._store.find("files"):
            if PurePosixPath(path).name not in used:
                self._store.rm_file(path)

    def _put(self, path: Path, name: str, size: int) -> None:
        """Sends a file, unless one of this size is there."""
        if self._size(name) == size:
            return
        self._store.put_file(str(path), name)
        if self._size(name) != size:
            raise OSError(f"{name} did not arrive whole")

    def _on_disk(self) -> set[str]:
        return {path.name for path in layout.list_checkpoints(self._run.checkpoints)}

    # ---- the store ---------------------------------------------------------------------------------------------------

    def _size(self, name: str) -> int | None:
        try:
            return int(self._store.info(name)["size"])
        except FileNotFoundError:
            return None

    def _manifests(self) -> Iterator[tuple[str, layout.Manifest]]:
        for path in map(PurePosixPath, self._store.find("manifests")):
            try:
                yield path.stem, layout.parse_manifest(path.name, self._store.cat_file(str(path)))
            except layout.CheckpointError as error:
                log.warning("passed over %s of the mirror: %s", path.stem, error)

    def _owner(self) -> dict[str, Any]:
        """The content of the owner's file; empty if nobody has the mirror."""
        try:
            content = json.loads(self._store.cat_file(OWNER))
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _beat(self) -> None:
        content = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "folder": self._folder,
            "beat": uuid.uuid4().hex,
        }
        self._store.pipe_file(OWNER, json.dumps(content).encode())

    def _small_files(self) -> list[Path]:
        run = self._run
        files = [run.config, run.model_config, run.generation_config, run.starts, run.metrics, run.tasks, run.wandb_id]
        return [*files, run.checkpoints / layout.BEST]


def open_store(url: str) -> Any:
    """The folder in a store of fsspec, without a request. Raises :class:`MirrorError`."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.dirfs import DirFileSystem

    options = {"auto_mkdir": True} if "://" not in url or url.startswith("file://") else {"use_listings_cache": False}
    with _faults_named():
        store, root = url_to_fs(url, **options)
    return DirFileSystem(path=root, fs=store)


@contextlib.contextmanager
def _faults_named() -> Iterator[None]:
    """Turns a fault of the store before training, or a missing package, into a :class:`MirrorError`."""
    try:
        yield
    except (MirrorError, layout.CheckpointError):
        raise
    except Exception as error:  # stores raise types of their own, whose messages may hold the url
        raise MirrorError(
            f"checkpoint.mirror: the store cannot be read and written ({_reason(error)}); check the address, the login "
            "and who may write there"
        ) from error


def _who(owner: dict[str, Any]) -> str:
    return f"host {owner.get('host', 'unknown')}, pid {owner.get('pid', 'unknown')}"


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError):  # names the package of the store
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "it has no such bucket or folder"
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__  # a message may hold the url
