"""Writes checkpoints in the background, whole or not at all.

Training stands still only while the state is copied to host memory. Then every rank's thread writes its own files below
``step-N.tmp`` and, last, a done-file with their sizes and checksums; rank 0's thread waits for all done-files, writes
the manifest and renames the folder. No collective is used, so a slow disk cannot mix with the collectives of training.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from relora_mora.checkpoint.layout import (
    LATEST,
    MANIFEST,
    FileEntry,
    Manifest,
    file_entry,
    list_checkpoints,
    step_folder,
    sync_folder,
    write_synced,
)
from relora_mora.cycle import Base
from relora_mora.zero import MOMENTS, ZeroEngine

POLL_SECONDS = 0.05


class CheckpointWriter:
    """One per rank. ``keep_last`` newest checkpoints stay, and those whose step is a multiple of ``keep_every_steps``."""

    def __init__(
        self,
        folder: Path,
        engine: ZeroEngine,
        base: Base,
        *,
        keep_last: int,
        keep_every_steps: int,
        merge_states: Callable[[list[dict[str, Any]]], dict[str, Any]],
        report: Callable[[str], None],
        timeout_seconds: float = 1800.0,
    ) -> None:
        self.folder, self.engine, self.base = folder, engine, base
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self.merge_states, self.report, self.timeout_seconds = merge_states, report, timeout_seconds
        self.last_failure: str | None = None
        self._thread: threading.Thread | None = None
        self._base_free = threading.Event()  # set while no write of the base is going on
        self._base_free.set()
        self._base_at: tuple[int, Path] | None = None  # (merges done, file) of the newest base file of this rank
        folder.mkdir(parents=True, exist_ok=True)
        umask = os.umask(0)
        os.umask(umask)
        self._mode = 0o666 & ~umask
        if engine.rank == 0:  # a done-file left by a killed run must not be taken for one of this run
            for path in folder.glob("step-*.tmp"):
                shutil.rmtree(path, ignore_errors=True)
        engine.sum_over_ranks(0)  # nobody writes before that is done

    def adopt_base(self, folder: Path, manifest: Manifest) -> None:
        """After a resume: the base files of the checkpoint are this run's, if they were written by as many ranks."""
        if manifest.world_size == self.engine.world_size:
            self._base_at = manifest.merges_done, folder / self._base_name

    @property
    def _base_name(self) -> str:
        return f"base-{self.engine.rank:05d}-of-{self.engine.world_size:05d}.safetensors"

    @property
    def _state_name(self) -> str:
        return f"state-{self.engine.rank:05d}-of-{self.engine.world_size:05d}.safetensors"

    def save(self, manifest: Manifest, data_state: dict[str, Any], tokenizer: Path) -> float:
        """Starts a checkpoint of the present state and returns the seconds that training stood still for it.

        ``manifest`` comes without files and data state; ``data_state`` is this rank's.
        """
        begin = time.perf_counter()
        self.wait()
        tensors = self._snapshot()
        self._base_free.clear()
        self._thread = threading.Thread(target=self._run, args=(manifest, data_state, tensors, tokenizer), daemon=True, name="checkpoint")
        self._thread.start()
        return time.perf_counter() - begin

    def wait_for_base(self) -> None:
        """Returns when no write reads the base: a merge may change it."""
        self._base_free.wait()

    def wait(self) -> None:
        """Returns when this rank's part of the last checkpoint (rank 0: the whole of it) is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _snapshot(self) -> dict[str, Tensor]:
        """This rank's pieces, copied to the host. At stage 0 every rank has everything, so each copies a share."""
        engine, tensors = self.engine, {}
        for index, shard in enumerate(engine.shards):
            if engine.stage == 0 and index % engine.world_size != engine.rank:
                continue
            state = engine.state_of(shard.flat)
            for kind, flat in [("master", shard.flat), *((kind, state[kind]) for kind in MOMENTS)]:
                tensors[f"{kind}|{shard.name}|{shard.start}"] = shard.of(flat.detach()).to("cpu", copy=True)
        return tensors

    def _run(self, manifest: Manifest, data_state: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Path) -> None:
        final = self.folder / step_folder(manifest.step)
        work = final.with_name(final.name + ".tmp")
        try:
            try:
                files = self._write_files(work, manifest, tensors, tokenizer)
            finally:
                self._base_free.set()
            done = {"files": {name: asdict(entry) for name, entry in files.items()}, "data_state": data_state}
            write_synced(work / f"done-{self.engine.rank:05d}.json", json.dumps(done))
            if self.engine.rank == 0:
                self._commit(work, final, manifest)
            self.last_failure = None
        except Exception as error:
            self.last_failure = f"checkpoint of step {manifest.step} failed on rank {self.engine.rank}: {error}"
            self.report(self.last_failure)
            self._say_failed(work)

    def _write_files(self, work: Path, manifest: Manifest, tensors: dict[str, Tensor], tokenizer: Path) -> dict[str, FileEntry]:
        work.mkdir(parents=True, exist_ok=True)
        names = [self._write_tensors(work / self._state_name, tensors)] if tensors else []
        if self.base.owned:
            names.append(self._write_base(work / self._base_name, manifest.merges_done))
        if self.engine.rank == 0:
            for source in sorted(path for path in tokenizer.rglob("*") if path.is_file()):
                target = work / "tokenizer" / source.relative_to(tokenizer)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(source, target)
                names.append(target)
        for path in names:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        for folder in {path.parent for path in names}:
            sync_folder(folder)
        return {str(path.relative_to(work)): file_entry(path) for path in names}

    def _write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> Path:
        save_file(tensors, path)
        path.chmod(self._mode)  # safetensors makes files that only their owner reads
        return path

    def _write_base(self, path: Path, merges_done: int) -> Path:
        if not (self._base_at is not None and self._base_at[0] == merges_done and _link_committed(self._base_at[1], path)):
            self._write_tensors(path, {f"base|{name}|0": self.base.weights[name] for name in self.base.owned})
        self._base_at = merges_done, path.parent.with_suffix("") / path.name
        return path

    def _commit(self, work: Path, final: Path, manifest: Manifest) -> None:
        dones = [self._await_done(work, rank) for rank in range(self.engine.world_size)]
        files = {name: FileEntry(**entry) for done in dones for name, entry in done["files"].items()}
        state = self.merge_states([done["data_state"] for done in dones])
        for rank in range(self.engine.world_size):
            (work / f"done-{rank:05d}.json").unlink()
        write_synced(work / MANIFEST, replace(manifest, files=files, data_state=state).dump())
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        work.replace(final)
        sync_folder(self.folder)
        write_synced(self.folder / LATEST, final.name + "\n")
        self._retire(manifest.step)

    def _await_done(self, work: Path, rank: int) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout_seconds
        path = work / f"done-{rank:05d}.json"
        while not path.exists():
            if (work / f"failed-{rank:05d}").exists():
                raise OSError(f"rank {rank} could not write its part")
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} did not finish its part in {self.timeout_seconds:.0f} s")
            time.sleep(POLL_SECONDS)
        return json.loads(path.read_text(encoding="utf-8"))

    def _say_failed(self, work: Path) -> None:
        """Frees the disk, as far as that goes; rank 0 removes the folder when it gives up."""
        try:
            if self.engine.rank == 0:
                shutil.rmtree(work, ignore_errors=True)
            else:
                (work / f"failed-{self.engine.rank:05d}").touch()
        except OSError as error:
            self.report(f"cannot tell rank 0 of the failed checkpoint ({error.strerror}); it gives up after {self.timeout_seconds:.0f} s")

    def _retire(self, newest: int) -> None:
        """Removes what retention does not keep, and what earlier runs left half done."""
        whole = [path for path in list_checkpoints(self.folder) if (path / MANIFEST).exists()]
        for path in whole[self.keep_last :]:
            step = int(path.name[5:])
            if step != newest and not (self.keep_every_steps and step % self.keep_every_steps == 0):
                (path / MANIFEST).unlink()  # from here on it is no checkpoint, whenever the removal is cut short
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("step-*.tmp"):
            if int(path.name[5:-4]) < newest:
                shutil.rmtree(path, ignore_errors=True)


def _link_committed(source: Path, target: Path) -> bool:
    """Links a file of a checkpoint that rank 0 may be about to rename from its ``.tmp`` folder; False when it is gone."""
    waiting = source.parent.with_name(source.parent.name + ".tmp") / source.name
    for place in (source, waiting, source):
        try:
            _link(place, target)
        except FileNotFoundError:
            continue
        return True
    return False


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)
