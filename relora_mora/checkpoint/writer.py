"""Writes checkpoints in the background, completely or not at all, and removes old ones.

Training only pauses while the state is copied to host memory. Then a thread of every rank writes the rank's files into
``step-N.JOB-ATTEMPT.tmp`` and sends their sizes and checksums, or the reason why it failed, to rank 0. Rank 0's thread
waits for all ranks, writes the manifest and renames the folder, or removes it after a failure. There is no collective,
so a slow disk cannot hold up training.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from relora_mora.checkpoint import layout
from relora_mora.checkpoint.mirror import Mirror
from relora_mora.checkpoint.rank_files import RankFiles, read_tokenizer
from relora_mora.distributed.collectives import from_first_rank
from relora_mora.system.files import make_folder, remove, sync, write_if_possible, write_synced

if TYPE_CHECKING:  # a checkpoint is read without DeepSpeed
    from relora_mora.engine.engine import ZeroEngine
    from relora_mora.engine.merging import FrozenMasters


POLL_SECONDS = 0.05


class Mailbox:
    """Messages in the job's key-value store, which works even if a disk is full or cannot be written.

    ``job`` separates the messages of one writer from those of others; it is the same on all ranks.
    """

    def __init__(self, job: str) -> None:
        everyone = torch.distributed.group.WORLD
        assert everyone is not None, "the ranks join before a run is built"
        self._store = torch.distributed.PrefixStore(f"checkpoint/{job}", everyone.get_group_store())

    def send(self, about: str, rank: int, message: dict[str, Any]) -> None:
        self._store.set(f"{about}/{rank}", json.dumps(message))

    def receive(self, about: str, rank: int, deadline: float) -> dict[str, Any] | None:
        """Takes a rank's message from the store; None if there is none by ``deadline`` (of ``time.monotonic``)."""
        key = f"{about}/{rank}"
        while not self._store.check([key]):  # waiting in the store would block its connection for the main thread
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS)
        message = json.loads(self._store.get(key))
        self._store.delete_key(key)
        return message


def retire(folder: Path, newest: int, *, keep_last: int, keep_every_steps: int) -> None:
    """Removes the checkpoints in ``checkpoints/`` up to step ``newest`` that need not be kept.

    It keeps the ``keep_last`` newest, those whose step is a multiple of ``keep_every_steps``, the newest one that a run
    can go back to, and the best one. Checkpoints of later steps belong to another history, so it does not touch them.
    """
    whole: list[tuple[int, Path]] = []  # newest first
    for path in layout.list_checkpoints(folder):
        step = layout.step_of(path)
        if step is not None and step <= newest and (path / layout.MANIFEST).exists():
            whole.append((step, path))
    kept = {path for step, path in whole if keep_every_steps and step % keep_every_steps == 0}
    kept |= {path for _, path in whole[:keep_last]} | {folder / layout.step_folder(layout.best_step(folder) or 0)}
    good = next((path for _, path in whole if layout.good_step(path) is not None), None)
    for _, path in whole:
        if path not in kept and path != good:
            layout.discard(path)


def tidy(folder: Path) -> None:
    """Removes unfinished checkpoints that a killed run left in ``checkpoints/``."""
    for path in folder.glob(f"*{layout.TEMPORARY}"):
        remove(path)


NAMED_RANKS = 3  # failed ranks that a message names
APPEAR_SECONDS = 10.0  # for a file that another host wrote to appear on this one
LATE_SECONDS = 1500.0  # for a rank to write its part; shorter than the watchdog lets a save take


class CheckpointWriter:
    """One per rank, constructed by all ranks together. :func:`retire` decides which checkpoints are kept.

    The files of the folder ``tokenizer`` are read now and written into every checkpoint, even if the folder changes.
    ``merge_states`` combines the data states of all ranks into one. On rank 0, ``sync_beside`` is called before a
    checkpoint gets its name, and ``report`` gets a line for each save that fails. ``last_failure`` is None if the last
    save succeeded; on ranks other than 0 it only covers their own part. ``mirror`` gets every complete checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        engine: "ZeroEngine",
        base: "FrozenMasters",
        *,
        tokenizer: Path,
        keep_last: int,
        keep_every_steps: int,
        merge_states: Callable[[list[dict[str, Any]]], dict[str, Any]],
        sync_beside: Callable[[], None],
        report: Callable[[str], None],
        mirror: Mirror | None = None,
    ) -> None:
        self.folder = folder
        self.rank = engine.rank
        self.world_size = engine.world_size
        self.keep_last = keep_last
        self.keep_every_steps = keep_every_steps
        self.merge_states = merge_states
        self.sync_beside = sync_beside
        self.report = report
        self.mirror = mirror
        self.last_failure: str | None = None
        files: dict[str, bytes] = {}
        from_first_rank(lambda: files.update(read_tokenizer(tokenizer)))
        self._files = RankFiles(engine, base, files)
        self._thread: threading.Thread | None = None
        self._base_free = threading.Event()  # set while no write reads the base
        self._base_free.set()
        self._attempt = 0
        self._given_up: list[Path] = []  # folders of failed saves, into which a slow rank may still write

        def prepare() -> str:
            make_folder(folder)
            tidy(folder)
            return uuid.uuid4().hex

        self._job = from_first_rank(prepare)  # no rank writes before this is done
        self._mailbox = Mailbox(self._job)
        if mirror is not None:
            mirror.start()

    def adopt_base(self, manifest: layout.Manifest) -> None:
        """Call it after a resume or rollback to a checkpoint of this run: later ones can share its base files."""
        self._files.adopt_base(self.folder / layout.step_folder(manifest.step), manifest)

    def save(self, manifest: layout.Manifest, data_state: dict[str, Any]) -> float:
        """Starts a checkpoint of the current state and returns the seconds that training paused for it.

        ``manifest`` has no files and no data state yet; ``data_state`` is this rank's. All ranks save the same steps.
        """
        begin = time.perf_counter()
        self.wait()
        tensors = self._files.snapshot()
        self._attempt += 1
        self._base_free.clear()
        self._thread = threading.Thread(
            target=self._run, args=(manifest, data_state, tensors), daemon=True, name="checkpoint"
        )
        self._thread.start()
        return time.perf_counter() - begin

    def name_best(self, step: int | None) -> None:
        """Writes the file ``best``; None: there is no best checkpoint. First rank only."""
        if step is None:
            (self.folder / layout.BEST).unlink(missing_ok=True)
        elif step != layout.best_step(self.folder) and (self.folder / layout.step_folder(step)).exists():
            name = layout.step_folder(step)
            write_if_possible(self.folder / layout.BEST, f"{name}\n", without=f"{name} may be removed")

    def wait_for_base(self) -> None:
        """Waits until no write reads the base, so that a merge may change it."""
        self._base_free.wait()

    def wait(self) -> None:
        """Waits until this rank's part of the last checkpoint is written, or on rank 0 all of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def send(self, step: int) -> None:
        """Has the mirror, if there is one, send a complete checkpoint, and forget those that are gone."""
        if self.mirror is not None:
            try:
                self.mirror.offer(self.folder / layout.step_folder(step))
            except OSError as error:
                self.report(f"checkpoint.mirror: the checkpoint of step {step} is not sent ({_reason(error)})")

    # ---- the writing thread -----------------------------------------------------------------------------------

    def _run(self, manifest: layout.Manifest, data_state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        final = self.folder / layout.step_folder(manifest.step)
        # a rank of an earlier job whose launcher was killed may still be writing; its folder has another name
        work = final.with_name(f"{final.name}.{self._job[:8]}-{self._attempt}{layout.TEMPORARY}")
        message: dict[str, Any]
        try:
            files = self._files.write(work, manifest.merges_done, tensors)
            message = {"files": {name: asdict(entry) for name, entry in files.items()}, "data_state": data_state}
        except Exception as error:
            message = {"failure": _reason(error)}
        finally:
            self._base_free.set()
        failure: str | None = message.get("failure")
        try:
            self._mailbox.send(work.name, self.rank, message)
            if self.rank == 0:
                failure = self._conclude(work, final, manifest)
        except Exception as error:  # the store is gone, and so is the job
            failure = _reason(error)
        self.last_failure = None if failure is None else f"the checkpoint of step {manifest.step} failed ({failure})"

    def _conclude(self, work: Path, final: Path, manifest: layout.Manifest) -> str | None:
        """Turns the files of all ranks into a checkpoint. If that fails, removes them and returns the reason.

        A rank that did not finish in time may still be writing.
        """
        deadline = time.monotonic() + LATE_SECONDS
        late = {"failure": f"did not finish its part in {LATE_SECONDS:.0f} s"}
        parts = [self._mailbox.receive(work.name, rank, deadline) or late for rank in range(self.world_size)]
        failed = [f"rank {rank}: {part['failure']}" for rank, part in enumerate(parts) if "failure" in part]
        if not failed:
            try:
                self._commit(work, final, manifest, parts)
            except Exception as error:
                failed = [f"rank 0: {_reason(error)}"]
            else:
                self._tidy_up(manifest)
                return None
        self._given_up.append(work)
        remove(work)
        unnamed = len(failed) - NAMED_RANKS
        failure = "; ".join([*failed[:NAMED_RANKS], *([f"and {unnamed} more"] if unnamed > 0 else [])])
        self.report(f"the checkpoint of step {manifest.step} failed ({failure}); earlier checkpoints are as they were")
        return failure

    def _commit(self, work: Path, final: Path, manifest: layout.Manifest, parts: list[dict[str, Any]]) -> None:
        files = {name: layout.FileEntry(**entry) for part in parts for name, entry in part["files"].items()}
        deadline = time.monotonic() + APPEAR_SECONDS
        for rank, part in enumerate(parts):
            for name in part["files"]:
                _await_file(work / name, files[name].bytes, rank, deadline)
        state = self.merge_states([part["data_state"] for part in parts])
        write_synced(work / layout.MANIFEST, replace(manifest, files=files, data_state=state).dump())
        self.sync_beside()
        if os.path.lexists(final):  # not from this history, in which every step is saved once
            layout.abandon(final)
        work.rename(final)
        sync(final.parent)

    def _tidy_up(self, manifest: layout.Manifest) -> None:
        """Updates files that a resume does not need. A failure is reported and does not affect the checkpoint."""
        step = manifest.step

        def remove_old() -> None:
            best = manifest.counters.get("best")
            self.name_best(best and best["step"])
            retire(self.folder, step, keep_last=self.keep_last, keep_every_steps=self.keep_every_steps)
            while self._given_up:
                remove(self._given_up.pop())

        for update in (lambda: write_synced(self.folder / layout.LATEST, layout.step_folder(step) + "\n"), remove_old):
            try:
                update()
            except OSError as error:
                self.report(
                    f"the checkpoint of step {step} is complete, "
                    f"but {layout.LATEST} or older checkpoints could not be updated ({_reason(error)})"
                )
        self.send(step)


def _await_file(path: Path, size: int, rank: int, deadline: float) -> None:
    """Waits until this rank sees a file that another one has written. Raises OSError if it does not appear."""
    while not path.is_file() or path.stat().st_size != size:
        if time.monotonic() > deadline:
            raise OSError(
                f"rank 0 does not see {path.name}, which rank {rank} has written: do all hosts share the run folder?"
            )
        time.sleep(0.1)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
