"""What a checkpoint looks like on disk, and when it exists.

::

    checkpoints/
      latest                                   the name of the newest checkpoint, replaced by rename
      step-00000200/
        manifest.json                          written last: step, settings, data state, every file with size and checksum
        state-00000-of-00002.safetensors       what rank 0 owned of the masters and moments, float32
        base-00000-of-00002.safetensors        the frozen weights that rank 0 owned, float32
        tokenizer/...                          what AutoTokenizer loads

A tensor of a state file is a piece of one parameter: its key is ``kind|name|start`` with the kind master, exp_avg or
exp_avg_sq, the parameter's name, and the place of the first element in the flattened parameter. A reader puts pieces
together for any world size and ZeRO stage. Base files are shared between checkpoints by hard links until a merge
changes the base. A folder without a manifest, or with a name that ends in ``.tmp``, is no checkpoint. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

FORMAT, VERSION = "relora_mora checkpoint", 1
MANIFEST, LATEST = "manifest.json", "latest"
KINDS = ("master", "exp_avg", "exp_avg_sq")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what was found, what was expected, what to do."""

    same_on_all_ranks = True


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint, as the manifest lists it."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """Everything of a checkpoint that is no tensor."""

    step: int
    merges_done: int
    operator: int | None
    world_size: int
    zero_stage: int
    bf16: bool
    group_steps: dict[str, int]  # Adam's step count per parameter group
    parameters: dict[str, list[int]]  # trainable parameters and their shapes
    frozen: dict[str, list[int]]  # frozen parameters and their shapes
    config: dict[str, Any]
    model_config: dict[str, Any]
    tokenizer_fingerprint: str
    data_fingerprint: str
    data_state: dict[str, Any]
    counters: dict[str, Any]  # what the run has counted so far: tokens, skipped steps, ...
    files: dict[str, FileEntry]

    def dump(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Reads a manifest; raises :class:`CheckpointError` where there is none, or one of another format or version."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no checkpoint ({MANIFEST}: {error.strerror}); give a folder such as RUN/checkpoints/step-00001000"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, it is not JSON ({error}); use an older checkpoint") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a {FORMAT}; give a folder such as RUN/checkpoints/step-00001000")
    version = values.pop("version", None)
    if version != VERSION:
        raise CheckpointError(f"{path}: format version {version}, this program reads version {VERSION}; use the release that wrote it")
    try:
        values["files"] = {name: FileEntry(**entry) for name, entry in values["files"].items()}
        return Manifest(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: damaged, its fields are not those of version {VERSION} ({error}); use an older checkpoint"
        ) from error


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint folder's name, None for other names."""
    name = folder.name
    return int(name[5:]) if name.startswith("step-") and name[5:].isdigit() else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders below ``checkpoints/`` that are named like checkpoints, newest first; whether they are whole is not checked."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if path.is_dir() and (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def file_entry(path: Path) -> FileEntry:
    """Size and checksum of a file."""
    digest = xxhash.xxh3_128()
    size = 0
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
            size += len(piece)
    return FileEntry(size, digest.hexdigest())


def damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """What is wrong with the named files of a checkpoint: the first that is missing, too short or altered."""
    for name in names:
        expected = manifest.files[name]
        try:
            found = file_entry(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found.bytes != expected.bytes:
            return f"{name}: {found.bytes} bytes, expected {expected.bytes}"
        if found != expected:
            return f"{name}: its checksum is not the one in {MANIFEST}"
    return None


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder last over a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
    sync_folder(path.parent)
