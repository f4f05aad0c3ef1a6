"""Writes checkpoints in the background, completely or not at all, and removes old ones.

Training only pauses while the state is copied to host memory. Then a thread of every rank writes the rank's files into
``step-N.JOB.tmp`` and sends their sizes and checksums, or the reason why it failed, to rank 0 through the job's
key-value store, which works even if a disk does not. Rank 0's thread waits for all ranks, writes the manifest and
renames the folder, or removes it after a failure. There is no collective, so a slow disk cannot hold up training.
"""

import contextlib
import itertools
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
from safetensors.torch import save_file
from torch import Tensor

from relora_mora.checkpoint import layout
from relora_mora.data.lanes import merge_states
from relora_mora.distributed.collectives import from_first_rank
from relora_mora.system.files import disk_faults_named, link_or_copy, make_folder, remove, sync, write_synced
from relora_mora.system.logs import log

if TYPE_CHECKING:  # a checkpoint is read without DeepSpeed
    from relora_mora.engine.engine import ZeroEngine
    from relora_mora.engine.merging import FrozenMasters


POLL_SECONDS = 0.05
NAMED_RANKS = 3  # failed ranks that a message names
APPEAR_SECONDS = 10.0  # for a file that another host wrote to appear on this one


class SaveError(Exception):
    """A checkpoint was not written. The message says on which rank and why."""


def retire(folder: Path, newest: int, *, keep_last: int, keep_every_steps: int) -> None:
    """Removes the checkpoints in ``checkpoints/`` up to step ``newest`` that need not be kept.

    It keeps the ``keep_last`` newest, those whose step is a multiple of ``keep_every_steps``, the newest one that a run
    can go back to, and the best one. Checkpoints of later steps belong to another history, so it does not touch them.
    """
    steps = {path: layout.step_of(path) or 0 for path in layout.list_checkpoints(folder)}
    ours = [path for path, step in steps.items() if step <= newest]
    good = next((path for path in ours if layout.good_step(path) is not None), None)
    best = folder / layout.step_folder(layout.best_step(folder) or 0)
    for path in ours:
        is_due = keep_every_steps > 0 and steps[path] % keep_every_steps == 0
        if not is_due and path not in (*ours[:keep_last], good, best):
            layout.discard(path)


def tidy(folder: Path) -> None:
    """Removes unfinished checkpoints that a killed run left in ``checkpoints/``."""
    for path in folder.glob(f"*{layout.TEMPORARY}"):
        remove(path)


class CheckpointWriter:
    """One per rank, constructed by all ranks together. :func:`retire` decides which checkpoints are kept.

    The files of the folder ``tokenizer`` are read now and written into every checkpoint, even if the folder changes.
    On rank 0, ``sync_beside`` is called before a checkpoint gets its name, and the log has a line for each save that
    fails. ``last_failure`` is None if the last save succeeded; on ranks other than 0 it only covers their own part.
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
        sync_beside: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.engine = engine
        self.rank = engine.rank
        self.base = base
        self.keep_last = keep_last
        self.keep_every_steps = keep_every_steps
        self.sync_beside = sync_beside
        self.last_failure: str | None = None
        self._tokenizer: dict[str, bytes] = {}  # on the first rank
        self._thread: threading.Thread | None = None
        self._base_free = threading.Event()  # set while no write reads the base
        self._base_free.set()

        def prepare() -> str:
            make_folder(folder)
            tidy(folder)
            for path in sorted(path for path in tokenizer.rglob("*") if path.is_file()):
                self._tokenizer[f"{layout.TOKENIZER}/{path.relative_to(tokenizer).as_posix()}"] = path.read_bytes()
            return uuid.uuid4().hex[:8]

        self._job = from_first_rank(prepare)  # no rank writes before this is done
        everyone = torch.distributed.group.WORLD
        assert everyone is not None, "the ranks join before a run is built"
        self._store = torch.distributed.PrefixStore(f"checkpoint/{self._job}", everyone.get_group_store())

    def save(self, manifest: layout.Manifest, data_state: dict[str, Any]) -> float:
        """Starts a checkpoint of the current state and returns the seconds that training paused for it.

        ``manifest`` has no files and no data state yet; ``data_state`` is this rank's. All ranks save the same steps.
        """
        begin = time.perf_counter()
        self.wait()
        tensors = snapshot(self.engine)
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
            write_synced(self.folder / layout.BEST, f"{layout.step_folder(step)}\n")

    def wait_for_base(self) -> None:
        """Waits until no write reads the base, so that a merge may change it."""
        self._base_free.wait()

    def wait(self) -> None:
        """Waits until this rank's part of the last checkpoint is written, or on rank 0 all of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # ---- the writing thread -----------------------------------------------------------------------------------

    def _run(self, manifest: layout.Manifest, data_state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        final = self.folder / layout.step_folder(manifest.step)
        # a rank of an earlier job whose launcher was killed may still be writing; its folder has another name
        work = final.with_name(f"{final.name}.{self._job}{layout.TEMPORARY}")
        part: dict[str, Any]
        failure: str | None = None
        try:
            files = self._write(work, manifest.merges_done, tensors)
            part = {"files": {name: asdict(entry) for name, entry in files.items()}, "data_state": data_state}
        except Exception as error:
            failure = f"rank {self.rank}: {_reason(error)}"
            part = {"failure": failure}
        finally:
            self._base_free.set()
        try:
            self._store.set(f"{work.name}/{self.rank}", json.dumps(part))
            if self.rank == 0:
                self._commit(work, final, manifest, self._receive_parts(work))
                self._tidy_up(manifest)
        except Exception as error:  # if the store is gone, so is the job
            failure = _reason(error)
            remove(work)
        self.last_failure = None if failure is None else f"the checkpoint of step {manifest.step} failed ({failure})"
        if self.last_failure is not None and self.rank == 0:
            log.error("%s; earlier checkpoints are as they were", self.last_failure)

    def _write(self, work: Path, merges_done: int, tensors: dict[str, Tensor]) -> dict[str, layout.FileEntry]:
        """Writes this rank's files, on the first rank with those of the tokenizer, and syncs them."""
        make_folder(work)
        files = write_rank_files(work, self.engine, self.base, merges_done, tensors)
        for name, content in self._tokenizer.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(content)
            files[name] = layout.file_entry(work / name)
        written = [work / name for name in files]
        for path in [*written, *{path.parent for path in written}]:
            sync(path)
        return files

    def _receive_parts(self, work: Path) -> list[dict[str, Any]]:
        """Takes the messages of all ranks from the store. The watchdog ends the job if one of them does not come.

        Raises :class:`SaveError` if a rank has failed.
        """
        parts: list[dict[str, Any]] = []
        for key in [f"{work.name}/{rank}" for rank in range(self.engine.world_size)]:
            while not self._store.check([key]):  # waiting in the store would block its connection for the main thread
                time.sleep(POLL_SECONDS)
            parts.append(json.loads(self._store.get(key)))
            self._store.delete_key(key)
        failures = [part["failure"] for part in parts if "failure" in part]
        if failures:
            raise SaveError("; ".join(failures[:NAMED_RANKS]) + "; ..." * (len(failures) > NAMED_RANKS))
        return parts

    def _commit(self, work: Path, final: Path, manifest: layout.Manifest, parts: list[dict[str, Any]]) -> None:
        """Turns the files of all ranks into a checkpoint. Raises :class:`SaveError` or OSError."""
        deadline = time.monotonic() + APPEAR_SECONDS
        files: dict[str, layout.FileEntry] = {}
        for rank, part in enumerate(parts):
            for name, entry in part["files"].items():
                files[name] = layout.FileEntry(**entry)
                _await_file(work / name, files[name].bytes, rank, deadline)
        state = merge_states(part["data_state"] for part in parts)
        write_synced(work / layout.MANIFEST, replace(manifest, files=files, data_state=state).dump())
        self.sync_beside()
        if os.path.lexists(final):  # not from this history, in which every step is saved once
            layout.abandon(final)
        work.rename(final)
        sync(final.parent)

    def _tidy_up(self, manifest: layout.Manifest) -> None:
        """Updates files that a resume does not need. A failure is reported and does not affect the checkpoint."""
        step = manifest.step
        try:
            best = manifest.counters.get("best")
            self.name_best(best and best["step"])
            retire(self.folder, step, keep_last=self.keep_last, keep_every_steps=self.keep_every_steps)
            write_synced(self.folder / layout.LATEST, layout.step_folder(step) + "\n")
        except OSError as error:
            fault = f"{layout.LATEST} or older checkpoints could not be updated ({_reason(error)})"
            log.error("the checkpoint of step %d is complete, but %s", step, fault)


def _await_file(path: Path, size: int, rank: int, deadline: float) -> None:
    """Waits until this rank sees a file that another one has written. Raises SaveError if it does not appear."""
    while not path.is_file() or path.stat().st_size != size:
        if time.monotonic() > deadline:
            raise SaveError(
                f"rank 0 does not see {path.name}, which rank {rank} has written: do all hosts share the run folder?"
            )
        time.sleep(0.1)


def _reason(error: Exception) -> str:
    if isinstance(error, SaveError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def snapshot(engine: "ZeroEngine") -> dict[str, Tensor]:
    """Copies what this rank saves to host memory: all that it holds, or at stage 0, where all hold the same, a share.

    A GPU copies to pinned memory, which torch caches for the next save, and the host waits once for all its copies.
    """
    pieces = engine.pieces()
    if engine.stage == 0:
        pieces = itertools.islice(pieces, engine.rank, None, engine.world_size)
    copies = {}
    for kind, name, start, values in pieces:
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        copies[f"{kind}|{name}|{start}"] = copy.copy_(values, non_blocking=True)
    if engine.device.type == "cuda":
        torch.cuda.current_stream(engine.device).synchronize()
    return copies


def write_rank_files(
    work: Path, engine: "ZeroEngine", base: "FrozenMasters", merges_done: int, tensors: dict[str, Tensor]
) -> dict[str, layout.FileEntry]:
    """Writes this rank's files into ``work``, a folder in ``checkpoints/``; returns their entries by name."""
    suffix = f"{engine.rank:05d}-of-{engine.world_size:05d}.safetensors"
    files: dict[str, layout.FileEntry] = {}
    if tensors:
        files[f"state-{suffix}"] = _write_tensors(work / f"state-{suffix}", tensors)
    if base.owned:
        files[f"base-{suffix}"] = write_base(work / f"base-{suffix}", base, merges_done)
    return files


def write_base(path: Path, base: "FrozenMasters", merges_done: int) -> layout.FileEntry:
    """Writes what this rank owns of the base, or links the file of an earlier checkpoint if no merge came after it."""
    for checkpoint in layout.list_checkpoints(path.parent.parent):
        with contextlib.suppress(layout.CheckpointError, FileNotFoundError):  # damaged, or just removed
            manifest = layout.read_manifest(checkpoint)
            if manifest.merges_done != merges_done or list(manifest.frozen) != list(base.owner):
                break
            entry = manifest.files.get(path.name)  # the name has the number of ranks
            if entry is None:
                break
            link_or_copy(checkpoint / path.name, path)
            if layout.file_entry(path) == entry:
                return entry
            path.unlink()
    return _write_tensors(path, {f"base|{name}|0": base.weights[name] for name in base.owned})


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> layout.FileEntry:
    with disk_faults_named(path.parent):
        save_file(tensors, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
    return layout.file_entry(path)
