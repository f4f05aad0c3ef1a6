"""Finds the checkpoint that a user names, and loads it into any world size and ZeRO stage."""

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from relora_mora.checkpoint import layout
from relora_mora.checkpoint.layout import CheckpointError, damaged
from relora_mora.distributed.collectives import on_all_ranks, same_on_all_ranks
from relora_mora.optim.rules import state_dtype
from relora_mora.system.files import raise_if_lost
from relora_mora.system.logs import shared_log
from relora_mora.system.run_folder import RunFolder

if TYPE_CHECKING:  # a checkpoint is read without DeepSpeed
    from relora_mora.engine.engine import ZeroEngine
    from relora_mora.engine.merging import FrozenMasters


_TYPES = {torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8"}  # as safetensors names them


class _Piece(NamedTuple):
    """A tensor in a file: elements [start, start + numel) of a flattened parameter."""

    start: int
    numel: int
    file: str
    key: str


class CheckpointReader:
    """The tensors of one checkpoint, by parameter.

    Raises :class:`CheckpointError` if a file is not a safetensors file, or if the pieces in the files do not cover each
    parameter of the manifest exactly once. It does not check checksums; :func:`verify` does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: layout.Manifest = layout.read_manifest(folder)
        self._files: dict[str, Any] = {}
        self._pieces: dict[tuple[str, str], list[_Piece]] = {
            (kind, name): [] for name in self.manifest.parameters for kind in self.manifest.kinds(name)
        }
        self._pieces |= {("base", name): [] for name in self.manifest.frozen}
        for file in self.manifest.files:
            if file.endswith(".safetensors") and "/" not in file:
                self._index(file)
        for (kind, name), pieces in self._pieces.items():
            *ends, end = itertools.accumulate((piece.numel for piece in sorted(pieces)), initial=0)
            numel = self.manifest.numel(name, kind)
            if [piece.start for piece in sorted(pieces)] != ends or end != numel:
                files = folder / ("base-*" if kind == "base" else "state-*")
                raise damaged(files, f"they do not hold each of the {numel} elements of {kind} of {name} once")

    def _index(self, file: str) -> None:
        for key in self._open(file).keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            tensor = self._open(file).get_slice(key)
            kind, _, rest = key.partition("|")
            name, _, start = rest.rpartition("|")
            well_formed = (kind, name) in self._pieces and start.isascii() and start.isdigit()
            expected = _TYPES[state_dtype(kind)]
            if not well_formed or tensor.get_dtype() != expected:
                problem = f"{key} ({tensor.get_dtype()}) is not an {expected} piece of a parameter in the manifest"
                raise damaged(self.folder / file, problem)
            self._pieces[kind, name].append(_Piece(int(start), math.prod(tensor.get_shape()), file, key))

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise_if_lost(error)
                raise damaged(self.folder / file, f"it cannot be read ({error})") from error
        return self._files[file]

    def piece(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of a flattened parameter, float32 [numel]; see ``layout`` for the kinds.

        Codes of 8 bits are exact in float32, too.
        Raises :class:`CheckpointError` if one is not finite: memory may have failed before the checksum was computed.
        """
        out = torch.empty(numel, dtype=torch.float32)
        for piece in self._pieces[kind, name]:
            left = max(start, piece.start)
            right = min(start + numel, piece.start + piece.numel)
            if left < right:
                try:
                    values = self._open(piece.file).get_tensor(piece.key).reshape(-1)
                except SafetensorError as error:
                    raise damaged(self.folder / piece.file, f"it cannot be read ({error})") from error
                out[left - start : right - start] = values[left - piece.start : right - piece.start]
        if not out.isfinite().all():
            raise damaged(self.folder, f"{kind} of {name} holds numbers that are not finite")
        return out

    def weight(self, name: str) -> torch.Tensor:
        """A whole parameter in float32: the master if it is trainable, the base if it is frozen."""
        kind = "master" if name in self.manifest.parameters else "base"
        shape = (self.manifest.parameters | self.manifest.frozen).get(name)
        if shape is None:
            raise CheckpointError(f"{self.folder}: has no parameter {name}")
        return self.piece(kind, name, 0, self.manifest.numel(name)).view(shape)

    def restore(self, engine: "ZeroEngine", base: "FrozenMasters") -> None:
        """Loads this checkpoint into an engine and its frozen masters; a collective.

        Raises an error on all ranks, even if only one cannot read what it needs.
        """
        trained = {name: list(engine.shapes[name]) for name in engine.moments}
        frozen = {name: list(engine.shapes[name]) for name in base.owner}
        ours = (trained, frozen, engine.moments, engine.matrix_shapes, set(engine.groups))
        saved = self.manifest
        moments = {name: saved.moments(name) for name in saved.parameters}
        if ours != (saved.parameters, saved.frozen, moments, saved.matrix_states, set(saved.group_steps)):
            different = ", ".join(sorted(set(trained) ^ set(saved.parameters))[:3]) or "other shapes or states"
            raise same_on_all_ranks(
                CheckpointError(
                    f"{self.folder}: its trainable parameters differ from this run's ({different}); "
                    "resume with the settings that it was saved with"
                )
            )
        on_all_ranks(lambda: self._read_own(engine, base))
        self._files.clear()  # else a removed checkpoint would keep its disk space until the run ends
        engine.refresh()
        base.push(engine)

    def _read_own(self, engine: "ZeroEngine", base: "FrozenMasters") -> None:
        for kind, name, start, values in engine.pieces():
            values.copy_(self.piece(kind, name, start, values.numel()).view(values.shape))
        engine.set_group_steps(self.manifest.group_steps)
        base.take(self.weight)


def verify(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Raises :class:`CheckpointError` unless a checkpoint is complete and intact.

    A rank only reads its share of the files.
    """
    manifest = layout.read_manifest(folder)
    if layout.step_of(folder) not in (None, manifest.step):
        raise damaged(folder / layout.MANIFEST, f"it belongs to step {manifest.step}")
    layout.check_files(folder, manifest, list(manifest.files)[rank::world_size])
    CheckpointReader(folder)


def first_whole(checkpoints: Iterable[Path], check: Callable[[Path], object] = verify) -> tuple[Path | None, list[str]]:
    """The first checkpoint for which ``check`` raises no ValueError, and the errors of those before it."""
    problems = []
    for checkpoint in checkpoints:
        try:
            check(checkpoint)
        except ValueError as error:  # also RanksError
            problems.append(str(error))
        else:
            return checkpoint, problems
    return None, problems


def check_folder(path: Path) -> None:
    """Raises :class:`CheckpointError` if there is no folder, so neither a run nor a checkpoint."""
    if not path.is_dir():
        fault = "not a folder" if path.exists() else "not found"
        raise CheckpointError(
            f"{path}: {fault}; give a run folder, or a checkpoint such as RUN/checkpoints/step-00001000"
        )


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``, or the newest complete one if that is a run folder or its ``checkpoints/``.

    ``RUN/best`` or ``RUN/checkpoints/best`` is the best one of a run with ``checkpoint.keep_best``. A warning names
    newer ones that are damaged. Raises :class:`CheckpointError` if there is none or if it is damaged.
    """
    path = at_best(path)
    for folder in (path, RunFolder(path).checkpoints):
        found, problems = first_whole(layout.list_checkpoints(folder))
        if found is None and problems:
            raise CheckpointError(f"{folder}: all checkpoints in it are damaged: {'; '.join(problems)}")
        for problem in problems:
            shared_log.warning("passed over %s", problem)
        if found is not None:
            return found
    check_folder(path)
    verify(path)
    return path


def newest_manifest(path: Path) -> layout.Manifest:
    """The manifest of the checkpoint that :func:`find_checkpoint` would find if it only looked at manifests."""
    path = at_best(path)
    for folder in (path, RunFolder(path).checkpoints):
        found, _ = first_whole(layout.list_checkpoints(folder), layout.read_manifest)
        path = found or path
    return layout.read_manifest(path)


def at_best(path: Path) -> Path:
    """The checkpoint that ``RUN/best`` or ``RUN/checkpoints/best`` names; any other path as it is."""
    if path.name != layout.BEST or path.is_dir():
        return path
    for checkpoints in (path.parent, RunFolder(path.parent).checkpoints):
        step = layout.best_step(checkpoints)
        if step is not None:
            return checkpoints / layout.step_folder(step)
    fault = "names no best checkpoint; a run has one after an evaluation, if checkpoint.keep_best names a metric"
    raise CheckpointError(f"{path.parent}: {fault}")
