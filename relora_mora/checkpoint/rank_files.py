"""The files of a checkpoint that one rank writes: what it owns of the masters, their state, and the frozen weights."""

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from relora_mora.checkpoint.layout import CheckpointError, FileEntry, file_entry, list_checkpoints, read_manifest
from relora_mora.system.files import disk_faults_named, link_or_copy

if TYPE_CHECKING:  # a checkpoint is read without DeepSpeed
    from relora_mora.engine.engine import ZeroEngine
    from relora_mora.engine.merging import FrozenMasters


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
) -> dict[str, FileEntry]:
    """Writes this rank's files into ``work``, a folder in ``checkpoints/``; returns their entries by name."""
    suffix = f"{engine.rank:05d}-of-{engine.world_size:05d}.safetensors"
    files: dict[str, FileEntry] = {}
    if tensors:
        files[f"state-{suffix}"] = _write_tensors(work / f"state-{suffix}", tensors)
    if base.owned:
        files[f"base-{suffix}"] = write_base(work / f"base-{suffix}", base, merges_done)
    return files


def write_base(path: Path, base: "FrozenMasters", merges_done: int) -> FileEntry:
    """Writes what this rank owns of the base, or links the file of an earlier checkpoint if no merge came after it."""
    for checkpoint in list_checkpoints(path.parent.parent):
        with contextlib.suppress(CheckpointError, FileNotFoundError):  # damaged, or just removed
            manifest = read_manifest(checkpoint)
            if manifest.merges_done != merges_done or list(manifest.frozen) != list(base.owner):
                break
            entry = manifest.files.get(path.name)  # the name has the number of ranks
            if entry is None:
                break
            link_or_copy(checkpoint / path.name, path)
            if file_entry(path) == entry:
                return entry
            path.unlink()
    return _write_tensors(path, {f"base|{name}|0": base.weights[name] for name in base.owned})


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> FileEntry:
    with disk_faults_named(path.parent):
        save_file(tensors, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
    return file_entry(path)
