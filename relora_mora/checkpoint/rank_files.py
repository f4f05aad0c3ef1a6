"""The files of a checkpoint that one rank writes: what it owns of the masters, their state, and the frozen weights."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from relora_mora.checkpoint.layout import CheckpointError, FileEntry, file_entry, list_checkpoints, read_manifest
from relora_mora.system.files import disk_faults_named, link_or_copy

if TYPE_CHECKING:  # a checkpoint is read without DeepSpeed
    from relora_mora.engine.engine import ZeroEngine
    from relora_mora.engine.masters import Fragment
    from relora_mora.engine.merging import FrozenMasters


_T = TypeVar("_T")


def snapshot(engine: "ZeroEngine") -> dict[str, Tensor]:
    """Copies this rank's fragments to host memory. At stage 0 all ranks own everything, so each takes a share."""
    pieces: dict[str, tuple[Fragment | None, Tensor]] = {}
    for fragment in _share(engine, engine.fragments):
        state = engine.state_of(fragment.flat)
        flats = {"master": fragment.flat, **{kind: state[kind] for kind in engine.moments[fragment.name]}}
        for kind, flat in flats.items():
            pieces[f"{kind}|{fragment.name}|{fragment.start}"] = fragment, flat
    for name, matrix in _share(engine, engine.matrix_states.items()):
        for kind, value in matrix.items():
            pieces[f"{kind}|{name}|0"] = None, value
    whole = {id(flat): flat.detach() for _, flat in pieces.values()}
    copies = dict(zip(whole, host_copies(whole.values()), strict=True))
    return {
        key: copies[id(flat)] if fragment is None else fragment.of(copies[id(flat)])
        for key, (fragment, flat) in pieces.items()
    }


def _share(engine: "ZeroEngine", owned: Iterable[_T]) -> Iterator[_T]:
    """The items that this rank saves: all that it owns, or at stage 0 every n-th."""
    if engine.stage > 0:
        return iter(owned)
    return itertools.islice(owned, engine.rank, None, engine.world_size)


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


def host_copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies tensors to host memory. A GPU copies to pinned memory, and the host waits once for all its copies.

    Torch caches pinned memory for the next save, in blocks that are rounded up to a power of two.
    """
    copies = []
    device = None  # the GPU, if there is one
    for tensor in tensors:
        device = tensor.device if tensor.is_cuda else device
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies.append(copy.copy_(tensor, non_blocking=True))
    if device is not None:
        torch.cuda.current_stream(device).synchronize()
    return copies
