"""The files of a checkpoint that one rank writes."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from relora_mora.checkpoint.layout import TOKENIZER, FileEntry, Manifest, file_entry, list_checkpoints
from relora_mora.system.files import disk_faults_named, link_or_copy, make_folder, ordinary_mode, sync

if TYPE_CHECKING:  # a checkpoint is read without DeepSpeed
    from relora_mora.engine.engine import ZeroEngine
    from relora_mora.engine.masters import Fragment
    from relora_mora.engine.merging import FrozenMasters


_T = TypeVar("_T")


@dataclass
class _SharedBase:
    """This rank's newest base file. Checkpoints share it by hard links until the next merge."""

    merges_done: int
    entry: FileEntry
    folder: Path  # where it was written: a checkpoint, or its folder before that got its name


class RankFiles:
    """Writes what this rank of ``engine`` owns: fragments of masters and moments, matrix states, frozen weights.

    The first rank adds ``tokenizer``, the content of the tokenizer's files by name (see :func:`read_tokenizer`).
    """

    def __init__(self, engine: "ZeroEngine", base: "FrozenMasters", tokenizer: Mapping[str, bytes]) -> None:
        self.engine = engine
        self.base = base
        self.tokenizer = tokenizer
        suffix = f"{engine.rank:05d}-of-{engine.world_size:05d}.safetensors"
        self.state_name = f"state-{suffix}"
        self.base_name = f"base-{suffix}"
        self._shared: _SharedBase | None = None
        self._mode = ordinary_mode()

    def adopt_base(self, folder: Path, manifest: Manifest) -> None:
        """The base equals that of this checkpoint. Its file can be shared if it holds exactly what this rank owns."""
        same = manifest.world_size == self.engine.world_size and list(manifest.frozen) == list(self.base.owner)
        entry = manifest.files.get(self.base_name) if same else None
        self._shared = None if entry is None else _SharedBase(manifest.merges_done, entry, folder)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies this rank's fragments to host memory. At stage 0 all ranks own everything, so each takes a share."""
        engine = self.engine
        pieces: dict[str, tuple[Fragment | None, Tensor]] = {}
        for fragment in self._share(engine.fragments):
            state = engine.state_of(fragment.flat)
            flats = {"master": fragment.flat, **{kind: state[kind] for kind in engine.moments[fragment.name]}}
            for kind, flat in flats.items():
                pieces[f"{kind}|{fragment.name}|{fragment.start}"] = fragment, flat
        for name, matrix in self._share(engine.matrix_states.items()):
            for kind, value in matrix.items():
                pieces[f"{kind}|{name}|0"] = None, value
        whole = {id(flat): flat.detach() for _, flat in pieces.values()}
        copies = dict(zip(whole, host_copies(whole.values()), strict=True))
        return {
            key: copies[id(flat)] if fragment is None else fragment.of(copies[id(flat)])
            for key, (fragment, flat) in pieces.items()
        }

    def _share(self, owned: Iterable[_T]) -> Iterator[_T]:
        """The items that this rank saves: all that it owns, or at stage 0 every n-th."""
        if self.engine.stage > 0:
            return iter(owned)
        return itertools.islice(owned, self.engine.rank, None, self.engine.world_size)

    def write(self, work: Path, merges_done: int, tensors: dict[str, Tensor]) -> dict[str, FileEntry]:
        """Writes the files into ``work``, a folder in ``checkpoints/``, and syncs them; returns them by name."""
        files: dict[str, FileEntry] = {}
        make_folder(work)
        if tensors:
            files[self.state_name] = self._write_tensors(work / self.state_name, tensors)
        if self.base.owned:
            files[self.base_name] = self._write_base(work, merges_done)
        if self.engine.rank == 0:
            for name, content in self.tokenizer.items():
                path = work / TOKENIZER / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                files[f"{TOKENIZER}/{name}"] = file_entry(path)
        written = [work / name for name in files]
        for path in [*written, *{path.parent for path in written}]:
            sync(path)
        return files

    def _write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> FileEntry:
        with disk_faults_named(path.parent):
            save_file(tensors, path)
        path.chmod(self._mode)  # safetensors creates files that only their owner can read
        return file_entry(path)

    def _write_base(self, work: Path, merges_done: int) -> FileEntry:
        path = work / self.base_name
        shared = self._shared if self._shared is not None and self._shared.merges_done == merges_done else None
        if shared is not None and self._link(shared, path) and file_entry(path) == shared.entry:
            entry = shared.entry
        else:
            path.unlink(missing_ok=True)
            entry = self._write_tensors(path, {f"base|{name}|0": self.base.weights[name] for name in self.base.owned})
        self._shared = _SharedBase(merges_done, entry, work)
        return entry

    def _link(self, shared: _SharedBase, target: Path) -> bool:
        """Links ``target`` to the shared file; False if that is gone.

        The first rank may just have given its folder the checkpoint's name, or have removed it after a failed save.
        Then the newest checkpoint has the file.
        """
        for folder in itertools.chain([shared.folder], list_checkpoints(target.parent.parent)):
            with contextlib.suppress(FileNotFoundError):
                target.unlink(missing_ok=True)
                link_or_copy(folder / self.base_name, target)
                return True
        return False


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The content of the files in a tokenizer's folder by relative path, such as ``tokenizer.json``."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


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
