"""Reads a checkpoint into any world size and ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from relora_mora.checkpoint.layout import KINDS, MANIFEST, CheckpointError, Manifest, damage, read_manifest
from relora_mora.checkpoint.places import list_checkpoints, list_new, step_of
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks
from relora_mora.optim import MOMENTS

if TYPE_CHECKING:
    from relora_mora.merging import FrozenMasters
    from relora_mora.zero import ZeroEngine


class _Piece(NamedTuple):
    """A tensor in a file: elements [start, start + numel) of a flattened parameter."""

    start: int
    numel: int
    file: str
    key: str


class CheckpointReader:
    """The tensors of one checkpoint, by parameter.

    Raises :class:`CheckpointError` for a file that is no safetensors file, and where the pieces in the files do not make up
    each parameter of the manifest exactly once. Checksums are :func:`verify`'s.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._files: dict[str, Any] = {}
        self._pieces: dict[tuple[str, str], list[_Piece]] = {
            (kind, name): [] for name in self.manifest.parameters for kind in KINDS
        }
        self._pieces |= {("base", name): [] for name in self.manifest.frozen}
        for file in self.manifest.tensor_files:
            if file.endswith(".safetensors"):
                self._index(file)
        for (kind, name), pieces in self._pieces.items():
            self._check_complete(kind, name, sorted(pieces))

    def _index(self, file: str) -> None:
        for key in self._open(file).keys():  # noqa: SIM118 - a safetensors handle is no mapping
            tensor = self._open(file).get_slice(key)
            kind, _, rest = key.partition("|")
            name, _, start = rest.rpartition("|")
            if (
                (kind, name) not in self._pieces
                or not start.isascii()
                or not start.isdigit()
                or tensor.get_dtype() != "F32"
            ):
                raise self._damaged(
                    f"{file}: {key} ({tensor.get_dtype()}) is not a float32 piece of a parameter in the manifest"
                )
            self._pieces[kind, name].append(_Piece(int(start), math.prod(tensor.get_shape()), file, key))

    def _check_complete(self, kind: str, name: str, pieces: list[_Piece]) -> None:
        end = 0
        for piece in pieces:
            if piece.start < end:
                raise self._damaged(f"{piece.file}: {piece.key} is there twice or overlaps another piece")
            if piece.start > end:
                break
            end += piece.numel
        numel = self.manifest.numel(name)
        if end > numel:
            raise self._damaged(f"{pieces[-1].file}: {pieces[-1].key} has {end - numel} elements too many")
        if end < numel:
            files = sorted(
                {file for file in self.manifest.files if file.startswith("base-" if kind == "base" else "state-")}
            )
            raise self._damaged(
                f"{', '.join(files) or 'its files'}: without element {end} (of {numel}) of {kind} of {name}"
            )

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}/{what}; use an older checkpoint")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise self._damaged(f"{file}: cannot be read ({error})") from error
        return self._files[file]

    def piece(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter, float32; kind as in ``layout``.

        Raises :class:`CheckpointError` where one is not finite: memory that failed before the checksum was made.
        """
        out = torch.empty(numel, dtype=torch.float32)
        for piece in self._pieces[kind, name]:
            left, right = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if left < right:
                try:
                    values = self._open(piece.file).get_tensor(piece.key).reshape(-1)
                except SafetensorError as error:
                    raise self._damaged(f"{piece.file}: cannot be read ({error})") from error
                out[left - start : right - start] = values[left - piece.start : right - piece.start]
        if not out.isfinite().all():
            raise CheckpointError(
                f"{self.folder}: {kind} of {name} holds numbers that are not finite; use an older checkpoint"
            )
        return out

    def weight(self, name: str) -> Tensor:
        """A whole parameter in float32: the master of a trainable one, the base of a frozen one."""
        kind = "master" if name in self.manifest.parameters else "base"
        shape = (self.manifest.parameters | self.manifest.frozen).get(name)
        if shape is None:
            raise CheckpointError(f"{self.folder}: has no parameter {name}")
        return self.piece(kind, name, 0, self.manifest.numel(name)).view(shape)

    def restore(self, engine: ZeroEngine, base: FrozenMasters) -> None:
        """Puts masters, moments, step counts and base where this rank's engine has them; a collective."""
        trained = {name: list(engine.shapes[name]) for names in engine.members for name in names}
        frozen = {name: list(engine.shapes[name]) for name in base.owner}
        if (trained, frozen) != (self.manifest.parameters, self.manifest.frozen):
            different = sorted(set(trained) ^ set(self.manifest.parameters))[:3]
            raise CheckpointError(
                f"{self.folder}: its trainable parameters are not this run's ({', '.join(different) or 'other shapes'}); "
                "resume with the settings it was made with"
            )
        if set(self.manifest.group_steps) != set(engine.group_names):
            raise CheckpointError(
                f"{self.folder}: its parameter groups are not this run's; resume with the settings it was made with"
            )
        problem: str | None = None
        try:
            self._read_own(engine, base)
        except CheckpointError as error:
            problem = str(error)
        first = next((text for text in gather_from_ranks(problem) if text is not None), None)
        if first is not None:  # nobody goes on alone
            raise CheckpointError(first)
        self._files.clear()  # else a removed checkpoint would hold its disk space until the run ends
        engine.refresh()
        base.push(engine)

    def _read_own(self, engine: ZeroEngine, base: FrozenMasters) -> None:
        groups = {
            name: group for group, names in zip(engine.group_names, engine.members, strict=True) for name in names
        }
        for fragment in engine.fragments:
            state = engine.state_of(fragment.flat)
            for kind in KINDS:
                target = fragment.of(state[kind] if kind in MOMENTS else fragment.flat.data)
                target.copy_(self.piece(kind, fragment.name, fragment.start, fragment.numel))
            state["step"].fill_(float(self.manifest.group_steps[groups[fragment.name]]))
        for name in base.owned:
            base.weights[name] = self.weight(name)


def verify(folder: Path, engine: ZeroEngine | None = None) -> str | None:
    """What is wrong with a checkpoint, None when it is whole. With an engine the ranks share the reading; a collective.

    Damage of the tokenizer beside the tensors does not count: see :func:`damaged_tokenizer`.
    """
    rank, world = (0, 1) if engine is None else (engine.rank, engine.world_size)
    problem = _damage_of_files(folder, rank, world)
    problems = [problem] if engine is None else gather_from_ranks(problem)
    first = next((text for text in problems if text is not None), None)
    if first is None:
        first = _damage_of_content(folder) if engine is None else from_first_rank(lambda: _damage_of_content(folder))
    return first


def _damage_of_files(folder: Path, rank: int, world: int) -> str | None:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    if step_of(folder) not in (None, manifest.step):
        return f"{MANIFEST}: is that of step {manifest.step}"
    return damage(folder, manifest, manifest.tensor_files[rank::world])


def _damage_of_content(folder: Path) -> str | None:
    try:
        CheckpointReader(folder)
    except CheckpointError as error:
        return str(error)
    return None


def newest_whole(
    folder: Path, engine: ZeroEngine | None = None, suits: Callable[[Path], bool] = lambda path: True
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint below ``folder`` that verifies, of those that suit, and why newer ones of them were passed over; a collective."""

    def candidates() -> list[Path]:
        return [path for path in _candidates(folder) if suits(path)]

    skipped: list[str] = []
    for candidate in candidates() if engine is None else from_first_rank(candidates):
        problem = verify(candidate, engine)
        if problem is None:
            return candidate, skipped
        skipped.append(f"{candidate.name}: {problem.removeprefix(f'{candidate}/').removeprefix(f'{candidate}: ')}")
    return None, skipped


def _candidates(folder: Path) -> list[Path]:
    """Newest first; what was about to take the place of a checkpoint comes before it."""
    return sorted(
        [*list_checkpoints(folder), *list_new(folder)],
        key=lambda path: (step_of(path.with_suffix("")) or 0, path.name),
        reverse=True,
    )
