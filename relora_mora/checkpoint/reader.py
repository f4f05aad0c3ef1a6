"""Reads a checkpoint into any world size and ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from relora_mora.checkpoint.layout import KINDS, CheckpointError, Manifest, damage, list_checkpoints, read_manifest
from relora_mora.cycle import Base
from relora_mora.zero import MOMENTS, ZeroEngine, from_first_rank


class CheckpointReader:
    """The tensors of one checkpoint, by parameter. Files are opened when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._files: dict[str, Any] = {}
        self._pieces: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}  # (start, numel, file, key)
        for file in self.manifest.files:
            if file.endswith(".safetensors"):
                for key in self._open(file).keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    kind, name, start = key.split("|")
                    numel = 1
                    for size in self._open(file).get_slice(key).get_shape():
                        numel *= size
                    self._pieces.setdefault((kind, name), []).append((int(start), numel, file, key))

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except Exception as error:
                raise CheckpointError(f"{self.folder / file}: cannot be read ({error}); use an older checkpoint") from error
        return self._files[file]

    def piece(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter, float32; kind as in ``layout``."""
        out = torch.empty(numel, dtype=torch.float32)
        filled = 0
        for begin, length, file, key in self._pieces.get((kind, name), []):
            left, right = max(start, begin), min(start + numel, begin + length)
            if left < right:
                out[left - start : right - start] = self._open(file).get_tensor(key).reshape(-1)[left - begin : right - begin]
                filled += right - left
        if filled != numel:
            raise CheckpointError(f"{self.folder}: holds {filled} of {numel} elements of {kind} of {name}; use an older checkpoint")
        return out

    def weight(self, name: str) -> Tensor:
        """A whole parameter in float32: the master of a trainable one, the base of a frozen one."""
        kind = "master" if name in self.manifest.parameters else "base"
        shape = self.manifest.parameters.get(name) or self.manifest.frozen.get(name)
        if shape is None:
            raise CheckpointError(f"{self.folder}: has no parameter {name}")
        return self.piece(kind, name, 0, torch.Size(shape).numel()).view(shape)

    def restore(self, engine: ZeroEngine, base: Base) -> None:
        """Puts masters, moments, step counts and base where this rank's engine has them; a collective."""
        expected = {name: list(engine.shapes[name]) for names in engine.members for name in names}
        if expected != self.manifest.parameters:
            different = sorted(set(expected) ^ set(self.manifest.parameters))[:3]
            raise CheckpointError(
                f"{self.folder}: its trainable parameters are not this run's ({', '.join(different) or 'other shapes'}); "
                "resume with the settings it was made with"
            )
        problem: CheckpointError | None = None
        try:
            self._read_own(engine, base)
        except CheckpointError as error:
            problem = error
        if engine.sum_over_ranks(problem is not None):  # nobody goes on alone
            raise problem or CheckpointError(f"{self.folder}: another rank could not read its part; use an older checkpoint")
        engine.refresh()
        base.push(engine)

    def _read_own(self, engine: ZeroEngine, base: Base) -> None:
        groups = {name: group for group, names in zip(engine.group_names, engine.members, strict=True) for name in names}
        for shard in engine.shards:
            state = engine.state_of(shard.flat)
            for kind in KINDS:
                target = shard.of(state[kind] if kind in MOMENTS else shard.flat.data)
                target.copy_(self.piece(kind, shard.name, shard.start, shard.numel))
            state["step"].fill_(float(self.manifest.group_steps[groups[shard.name]]))
        for name in base.owned:
            base.weights[name] = self.weight(name)


def verify(folder: Path, engine: ZeroEngine | None = None) -> str | None:
    """What is wrong with a checkpoint, None when it is whole. With an engine the ranks share the reading; a collective."""
    rank, world = (0, 1) if engine is None else (engine.rank, engine.world_size)
    try:
        manifest = read_manifest(folder)
        problem = damage(folder, manifest, list(manifest.files)[rank::world])
    except CheckpointError as error:
        problem = str(error)
    if engine is not None and engine.sum_over_ranks(problem is not None):
        return problem or "another rank found a damaged file"
    return problem


def newest_whole(folder: Path, engine: ZeroEngine | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint below ``folder`` that verifies, and why newer ones were passed over; a collective."""
    skipped: list[str] = []
    for candidate in list_checkpoints(folder) if engine is None else from_first_rank(lambda: list_checkpoints(folder)):
        problem = verify(candidate, engine)
        if problem is None:
            return candidate, skipped
        skipped.append(f"{candidate.name}: {problem}")
    return None, skipped


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Names of settings (dotted) whose values differ between two dumps of a config."""
    for section in {**saved, **now}:
        before, after = saved.get(section, {}), now.get(section, {})
        for key in {**before, **after}:
            if before.get(key) != after.get(key):
                yield f"{section}.{key}"
