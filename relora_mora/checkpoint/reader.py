"""Finds the checkpoint that a user names, and loads it into any world size and ZeRO stage."""

import contextlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from relora_mora.checkpoint import layout
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks, same_on_all_ranks
from relora_mora.optim.rules import state_dtype
from relora_mora.system.files import raise_if_lost
from relora_mora.system.logs import shared_log
from relora_mora.system.run_folder import RunFolder

if TYPE_CHECKING:  # a checkpoint is read without DeepSpeed
    from relora_mora.engine.engine import ZeroEngine
    from relora_mora.engine.merging import FrozenMasters


# of tensors in a file: safetensors' names, and ours with an article
_TYPES = {torch.float32: ("F32", "a float32"), torch.int8: ("I8", "an int8"), torch.uint8: ("U8", "a uint8")}


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
            self._check_complete(kind, name, sorted(pieces))

    def _index(self, file: str) -> None:
        for key in self._open(file).keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            tensor = self._open(file).get_slice(key)
            kind, _, rest = key.partition("|")
            name, _, start = rest.rpartition("|")
            well_formed = (kind, name) in self._pieces and start.isascii() and start.isdigit()
            dtype, piece = _TYPES[state_dtype(kind)]
            if not well_formed or tensor.get_dtype() != dtype:
                raise self._damaged(
                    f"{file}: {key} ({tensor.get_dtype()}) is not {piece} piece of a parameter in the manifest"
                )
            self._pieces[kind, name].append(_Piece(int(start), math.prod(tensor.get_shape()), file, key))

    def _check_complete(self, kind: str, name: str, pieces: list[_Piece]) -> None:
        *ends, end = itertools.accumulate((piece.numel for piece in pieces), initial=0)
        numel = self.manifest.numel(name, kind)
        if [piece.start for piece in pieces] != ends or end != numel:
            prefix = "base-" if kind == "base" else "state-"
            files = ", ".join(sorted(file for file in self.manifest.files if file.startswith(prefix))) or "its files"
            raise self._damaged(f"{files}: do not hold each of the {numel} elements of {kind} of {name} once")

    def _damaged(self, problem: str) -> layout.CheckpointError:
        return layout.CheckpointError(f"{self.folder}/{problem}; use an older checkpoint")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise_if_lost(error)
                raise self._damaged(f"{file}: cannot be read ({error})") from error
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
                    raise self._damaged(f"{piece.file}: cannot be read ({error})") from error
                out[left - start : right - start] = values[left - piece.start : right - piece.start]
        if not out.isfinite().all():
            raise layout.CheckpointError(
                f"{self.folder}: {kind} of {name} holds numbers that are not finite; use an older checkpoint"
            )
        return out

    def weight(self, name: str) -> torch.Tensor:
        """A whole parameter in float32: the master if it is trainable, the base if it is frozen."""
        kind = "master" if name in self.manifest.parameters else "base"
        shape = (self.manifest.parameters | self.manifest.frozen).get(name)
        if shape is None:
            raise layout.CheckpointError(f"{self.folder}: has no parameter {name}")
        return self.piece(kind, name, 0, self.manifest.numel(name)).view(shape)

    def restore(self, engine: "ZeroEngine", base: "FrozenMasters") -> None:
        """Loads this checkpoint into an engine and its frozen masters; a collective.

        Raises :class:`CheckpointError` on all ranks, even if only one cannot read what it needs.
        """
        trained = {name: list(engine.shapes[name]) for names in engine.members for name in names}
        frozen = {name: list(engine.shapes[name]) for name in base.owner}
        moments = {name: self.manifest.moments(name) for name in trained}
        ours = (trained, frozen, engine.moments, engine.matrix_shapes, set(engine.group_names))
        saved = self.manifest
        if ours != (saved.parameters, saved.frozen, moments, saved.matrix_states, set(saved.group_steps)):
            different = ", ".join(sorted(set(trained) ^ set(saved.parameters))[:3]) or "other shapes or states"
            raise same_on_all_ranks(
                layout.CheckpointError(
                    f"{self.folder}: its trainable parameters differ from this run's ({different}); "
                    "resume with the settings that it was saved with"
                )
            )
        problem: str | None = None
        try:
            self._read_own(engine, base)
        except layout.CheckpointError as error:
            problem = str(error)
        problems = [text for text in gather_from_ranks(problem) if text is not None]
        if problems:
            raise same_on_all_ranks(layout.CheckpointError(problems[0]))
        self._files.clear()  # else a removed checkpoint would keep its disk space until the run ends
        engine.refresh()
        base.push(engine)

    def _read_own(self, engine: "ZeroEngine", base: "FrozenMasters") -> None:
        groups = {
            name: group for group, names in zip(engine.group_names, engine.members, strict=True) for name in names
        }
        for fragment in engine.fragments:
            state = engine.state_of(fragment.flat)
            for kind in ("master", *self.manifest.moments(fragment.name)):
                target = fragment.of(fragment.flat.data if kind == "master" else state[kind])
                target.copy_(self.piece(kind, fragment.name, fragment.start, fragment.numel))
            state["step"].fill_(float(self.manifest.group_steps[groups[fragment.name]]))
        for name, matrix in engine.matrix_states.items():
            for kind, value in matrix.items():
                value.copy_(self.piece(kind, name, 0, value.numel()).view(value.shape))
        base.take(self.weight)


def verify(folder: Path, ranks: tuple[int, int] | None = None) -> str | None:
    """The problem with a checkpoint; None if it is complete and intact.

    With ``ranks``, which is this rank and their number, this is a collective, and the ranks share the reading.
    """
    if ranks is None:
        return _damage_of_files(folder) or _damage_of_content(folder)
    problems = filter(None, gather_from_ranks(_damage_of_files(folder, *ranks)))
    return next(problems, None) or from_first_rank(lambda: _damage_of_content(folder))


def _damage_of_files(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    try:
        manifest = layout.read_manifest(folder)
    except layout.CheckpointError as error:
        return str(error)
    if layout.step_of(folder) not in (None, manifest.step):
        return f"{layout.MANIFEST}: belongs to step {manifest.step}"
    return layout.damage(folder, manifest, list(manifest.files)[rank::world_size])


def _damage_of_content(folder: Path) -> str | None:
    try:
        CheckpointReader(folder)
    except layout.CheckpointError as error:
        return str(error)
    return None


def newest_whole(
    folder: Path, ranks: tuple[int, int] | None = None, suits: Callable[[Path], bool] = lambda path: True
) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint in ``folder`` that suits, and the problems of newer ones that suit.

    With ``ranks`` this is a collective; see :func:`verify`.
    """

    def candidates() -> list[Path]:
        return [path for path in layout.list_checkpoints(folder) if suits(path)]

    skipped: list[str] = []
    for candidate in candidates() if ranks is None else from_first_rank(candidates):
        problem = verify(candidate, ranks)
        if problem is None:
            return candidate, skipped
        skipped.append(f"{candidate.name}: {problem.removeprefix(f'{candidate}/').removeprefix(f'{candidate}: ')}")
    return None, skipped


def check_folder(path: Path) -> None:
    """Raises :class:`CheckpointError` if there is no folder, so neither a run nor a checkpoint."""
    if not path.is_dir():
        fault = "not a folder" if path.exists() else "not found"
        raise layout.CheckpointError(
            f"{path}: {fault}; give a run folder, or a checkpoint such as RUN/checkpoints/step-00001000"
        )


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``, or the newest complete one if that is a run folder or its ``checkpoints/``.

    ``RUN/best`` or ``RUN/checkpoints/best`` is the best one of a run with ``checkpoint.keep_best``. A warning names
    newer ones that are damaged. Raises :class:`CheckpointError` if there is none or if it is damaged.
    """
    path = at_best(path)
    for folder in (path, RunFolder(path).checkpoints):
        while candidates := layout.list_checkpoints(folder):
            found, skipped = newest_whole(folder)
            if found is not None:
                for reason in skipped:
                    shared_log.warning("%s: passed over %s", folder, reason)
                return found
            if layout.list_checkpoints(folder) == candidates:  # else a run has written newer ones and removed these
                raise layout.CheckpointError(f"{folder}: all checkpoints in it are damaged: {'; '.join(skipped)}")
    check_folder(path)
    problem = verify(path)
    if problem is not None:
        raise layout.CheckpointError(
            problem if problem.startswith(str(path)) else f"{path}: {problem}; use an older checkpoint"
        )
    return path


def at_best(path: Path) -> Path:
    """The checkpoint that ``RUN/best`` or ``RUN/checkpoints/best`` names; any other path as it is."""
    if path.name != layout.BEST or path.is_dir():
        return path
    for checkpoints in (path.parent, RunFolder(path.parent).checkpoints):
        step = layout.best_step(checkpoints)
        if step is not None:
            return checkpoints / layout.step_folder(step)
    fault = "names no best checkpoint; a run has one after an evaluation, if checkpoint.keep_best names a metric"
    raise layout.CheckpointError(f"{path.parent}: {fault}")


def newest_manifest(path: Path) -> layout.Manifest:
    """The manifest of the checkpoint at ``path``, or the newest readable one if that is a run folder or its
    ``checkpoints/``. The checkpoint's other files are not checked.

    Raises :class:`CheckpointError` if there is none.
    """
    path = at_best(path)
    for folder in (path, RunFolder(path).checkpoints):
        for checkpoint in layout.list_checkpoints(folder):
            with contextlib.suppress(layout.CheckpointError):
                return layout.read_manifest(checkpoint)
    return layout.read_manifest(path)
