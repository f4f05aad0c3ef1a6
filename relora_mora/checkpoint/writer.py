"""Writes checkpoints in the background, whole or not at all.

Training stands still only while the state is copied to host memory. Then every rank's thread writes its own files below
``step-N.JOB-ATTEMPT.tmp`` and tells rank 0 their sizes and checksums, or why it failed. Rank 0's thread waits for all ranks,
writes the manifest and renames the folder; after a failure it removes it. No collective is used, so a slow disk cannot
mix with the collectives of training.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from relora_mora.checkpoint.layout import LATEST, MANIFEST, CheckpointError, FileEntry, Manifest, read_manifest
from relora_mora.checkpoint.mailbox import Mailbox
from relora_mora.checkpoint.places import (
    NEW,
    TEMPORARY,
    discard,
    list_checkpoints,
    list_new,
    put_in_place,
    step_folder,
    step_of,
)
from relora_mora.checkpoint.rank_files import RankFiles
from relora_mora.checkpoint.reader import verify
from relora_mora.checkpoint.tokenizer import read_tokenizer
from relora_mora.distributed.collectives import from_first_rank
from relora_mora.system.files import remove, write_synced

if TYPE_CHECKING:
    from relora_mora.merging import FrozenMasters
    from relora_mora.zero import ZeroEngine

NAMED_RANKS = 3  # of those that failed
APPEAR_SECONDS = 10.0  # for a file that another host wrote to be seen on this one


class CheckpointWriter:
    """One per rank, made by all ranks together. ``keep_last`` newest checkpoints stay, those whose step is a multiple of
    ``keep_every_steps``, and the newest one that a run can go back to.

    ``report`` gets a line for each save that failed, on rank 0. ``last_failure`` is None where the last save went well; on
    other ranks than the first it knows only of this rank's part. The files of the folder ``tokenizer`` are read here and
    written into every checkpoint, whatever becomes of the folder.
    """

    def __init__(
        self,
        folder: Path,
        engine: ZeroEngine,
        base: FrozenMasters,
        *,
        tokenizer: Path,
        keep_last: int,
        keep_every_steps: int,
        merge_states: Callable[[list[dict[str, Any]]], dict[str, Any]],
        report: Callable[[str], None],
        timeout_seconds: float = 1800.0,
    ) -> None:
        self.folder, self.rank, self.world_size = folder, engine.rank, engine.world_size
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self.merge_states, self.report, self.timeout_seconds = merge_states, report, timeout_seconds
        self.last_failure: str | None = None
        files: dict[str, bytes] = {}
        from_first_rank(lambda: files.update(read_tokenizer(tokenizer)))
        self._part = RankFiles(engine, base, files)
        self._thread: threading.Thread | None = None
        self._base_free = threading.Event()  # set while no write of the base is going on
        self._base_free.set()
        self._attempt = 0
        self._given_up: list[Path] = []  # folders of failed saves: a slow rank may still have written into one
        self._job = from_first_rank(lambda: _prepared(folder))  # nobody writes before that is done
        self._mailbox = Mailbox(self._job)

    def adopt_base(self, folder: Path, manifest: Manifest) -> None:
        """After a resume or a return to a checkpoint of this run: base files written from now on can be shared with it."""
        self._part.adopt_base(folder, manifest)

    def save(self, manifest: Manifest, data_state: dict[str, Any]) -> float:
        """Starts a checkpoint of the present state and returns the seconds that training stood still for it.

        ``manifest`` comes without files and data state; ``data_state`` is this rank's. All ranks save the same steps.
        """
        begin = time.perf_counter()
        self.wait()
        tensors = self._part.snapshot()
        self._attempt += 1
        self._base_free.clear()
        self._thread = threading.Thread(
            target=self._run, args=(manifest, data_state, tensors), daemon=True, name="checkpoint"
        )
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

    # ---- of the thread ----------------------------------------------------------------------------------------

    def _run(self, manifest: Manifest, data_state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        final = self.folder / step_folder(manifest.step)
        # a rank of an earlier start, whose launcher was killed, may still be writing: not into this folder
        work = final.with_name(f"{final.name}.{self._job[:8]}-{self._attempt}{TEMPORARY}")
        message: dict[str, Any]
        failure: str | None
        try:
            files = self._part.write(work, final, manifest.merges_done, tensors)
            message = {"files": {name: asdict(entry) for name, entry in files.items()}, "data_state": data_state}
        except Exception as error:
            message = {"failure": _reason(error)}
        finally:
            self._base_free.set()
        failure = message.get("failure")
        try:
            self._mailbox.send(work.name, self.rank, message)
            if self.rank == 0:
                failure = self._conclude(work, final, manifest)
        except Exception as error:  # the store is gone, and the job with it
            failure = _reason(error)
        self.last_failure = None if failure is None else f"the checkpoint of step {manifest.step} failed ({failure})"

    def _conclude(self, work: Path, final: Path, manifest: Manifest) -> str | None:
        """Makes the parts of all ranks a checkpoint, or removes them and returns why. Nobody writes any more, but a rank out of time."""
        deadline = time.monotonic() + self.timeout_seconds
        late = {"failure": f"did not finish its part in {self.timeout_seconds:.0f} s"}
        parts = [self._mailbox.receive(work.name, rank, deadline) or late for rank in range(self.world_size)]
        failed = [f"rank {rank}: {part['failure']}" for rank, part in enumerate(parts) if "failure" in part]
        if not failed:
            try:
                self._commit(work, final, manifest, parts)
            except Exception as error:
                failed = [f"rank 0: {_reason(error)}"]
            else:
                self._tidy_up(manifest.step)
                return None
        self._given_up.append(work)
        remove(work)
        failure = "; ".join(failed[:NAMED_RANKS]) + (
            f"; and {len(failed) - NAMED_RANKS} more" if len(failed) > NAMED_RANKS else ""
        )
        self.report(f"the checkpoint of step {manifest.step} failed ({failure}); earlier checkpoints are as they were")
        return failure

    def _commit(self, work: Path, final: Path, manifest: Manifest, parts: list[dict[str, Any]]) -> None:
        files = {name: FileEntry(**entry) for part in parts for name, entry in part["files"].items()}
        deadline = time.monotonic() + APPEAR_SECONDS
        for rank, part in enumerate(parts):
            for name in part["files"]:
                _await_file(work / name, files[name].bytes, rank, deadline)
        state = self.merge_states([part["data_state"] for part in parts])
        write_synced(work / MANIFEST, replace(manifest, files=files, data_state=state).dump())
        new = final.with_name(final.name + NEW)
        if new.exists():  # a save of this step that was whole, but could not get its name
            put_in_place(new)
        work.rename(new)
        put_in_place(new)

    def _tidy_up(self, step: int) -> None:
        """What a resume does not need: it must not spoil a save."""
        for update in (
            lambda: write_synced(self.folder / LATEST, step_folder(step) + "\n"),
            lambda: self._retire(step),
        ):
            try:
                update()
            except OSError as error:
                self.report(
                    f"the checkpoint of step {step} is whole, but what is beside it could not be updated ({_reason(error)})"
                )

    def _retire(self, newest: int) -> None:
        """Removes what retention does not keep; checkpoints of later steps are of another history."""
        steps = {
            step: path
            for path in list_checkpoints(self.folder)
            if (step := step_of(path)) is not None and step <= newest
        }
        whole = [(step, path) for step, path in steps.items() if (path / MANIFEST).exists()]
        kept = {path for step, path in whole if self.keep_every_steps and step % self.keep_every_steps == 0}
        kept |= {path for _, path in [*whole[: self.keep_last], *_first_good(whole)]}
        for _, path in whole:
            if path not in kept:
                discard(path)
        while self._given_up:
            remove(self._given_up.pop())


def _await_file(path: Path, size: int, rank: int, deadline: float) -> None:
    """Returns when a rank's file is there for this rank, too. Raises OSError when it does not come."""
    while not path.is_file() or path.stat().st_size != size:
        if time.monotonic() > deadline:
            raise OSError(
                f"{path.name}, which rank {rank} has written, is not seen by rank 0: do all hosts share the run folder?"
            )
        time.sleep(0.1)


def _first_good(whole: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """The first of these checkpoints that a run can go back to, if there is one."""
    for step, path in whole:
        with contextlib.suppress(CheckpointError):
            if read_manifest(path).is_good:
                return [(step, path)]
    return []


def tidy(folder: Path) -> None:
    """Finishes or removes what a killed run left half done below ``checkpoints/``."""
    for new in list_new(folder):
        if verify(new) is None or not new.with_suffix("").exists():
            put_in_place(new)
        else:
            remove(new)
    for path in folder.glob(f"step-*{TEMPORARY}"):
        remove(path)


def _prepared(folder: Path) -> str:
    """Makes the folder ready, and a name for the writer that uses it now."""
    folder.mkdir(parents=True, exist_ok=True)
    tidy(folder)
    return uuid.uuid4().hex


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
