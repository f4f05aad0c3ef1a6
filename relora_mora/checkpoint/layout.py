"""What a checkpoint looks like on disk, and when it exists.

::

    checkpoints/
      latest                                   the name of the newest checkpoint, replaced by rename
      step-00000200/
        manifest.json                          written last: step, settings, data state, size and checksum of every file
        state-00000-of-00002.safetensors       what rank 0 owned of masters, moments and states of matrices, float32
        base-00000-of-00002.safetensors        the frozen weights that rank 0 owned, float32
        tokenizer/...                          what AutoTokenizer loads; damage here does not cost the tensors

A folder ``*.tmp`` is being written or removed and does not count. A folder ``*.new`` is whole and about to replace
``step-N``; it counts, in case a kill came in between.

A tensor of a state file is a piece of one parameter: its key is ``kind|name|start`` with the kind master, exp_avg,
exp_avg_sq or momentum, the parameter's name, and the index of the first element in the flattened parameter. What an
optimizer keeps of a whole matrix (``matrix_states`` of the manifest) has kinds of its own; those tensors are whole. A
reader puts pieces together for any world size and ZeRO stage. Base files are shared between checkpoints by hard links
until a merge changes the base. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import AfterValidator, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError

from relora_mora.config.registry import MATRIX_OPTIMIZERS
from relora_mora.operators import Draw
from relora_mora.optim.groups import parameter_moments
from relora_mora.system.files import raise_if_lost, remove, sync

NEW = ".new"
TEMPORARY = ".tmp"


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint folder, None for other names."""
    match = re.fullmatch(r"step-([0-9]{8,15})", folder.name)
    return int(match[1]) if match and folder.name == step_folder(int(match[1])) else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders below ``checkpoints/`` that are named like checkpoints, whole or not, newest first."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if path.is_dir() and (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def list_new(folder: Path) -> list[Path]:
    """Whole checkpoints that were about to take the place of the folder of their step, newest first."""
    return sorted(
        (path for path in folder.glob(f"step-*{NEW}") if path.is_dir() and step_of(path.with_suffix("")) is not None),
        reverse=True,
    )


def put_in_place(new: Path) -> None:
    """Renames a whole checkpoint ``step-N.new`` to ``step-N``; what had that name is removed only after that."""
    final = new.with_suffix("")
    aside = _set_aside(final)
    new.rename(final)
    sync(final.parent)
    remove(aside)


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint. However this is cut short, nothing that is left looks like one."""
    remove(_set_aside(checkpoint))


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.old{TEMPORARY}")
    remove(aside)
    if os.path.lexists(path):
        path.rename(aside)
    return aside


FORMAT = "relora_mora checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
_OF_MODELS = ("config.json", "adapter_config.json")  # what an export has instead
LATEST = "latest"
TOKENIZER = "tokenizer"

Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]  # also exact as a float


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what was found, what was expected, what to do."""


def _inside(name: str) -> str:
    if not name.isprintable() or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("not a path inside the checkpoint")
    return name


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint, as the manifest lists it."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    bytes: Count
    xxh3_128: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but its tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    step: Count
    merges_done: Count
    operator: Count | None
    world_size: Annotated[Count, Field(ge=1)]
    zero_stage: Count
    bf16: StrictBool
    group_steps: dict[str, Count]  # Adam's step count per parameter group
    parameters: dict[str, list[Count]]  # trainable parameters and their shapes
    frozen: dict[str, list[Count]]  # frozen parameters and their shapes
    config: dict[str, dict[str, Any]]
    model_config: dict[str, Any]
    tokenizer_fingerprint: str
    data_fingerprint: str
    data_order: str  # fingerprint of what gives the places in data_state their meaning
    data_state: dict[str, Any]
    counters: dict[str, Any]  # what the run has counted so far: tokens, skipped steps, ...
    files: dict[Annotated[str, AfterValidator(_inside)], FileEntry]
    data_content: str  # fingerprint of the text of the training data
    eos_token_id: Count  # ends a document; not part of the fingerprint of a Hugging Face tokenizer
    operator_seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] | None  # of a drawn operator
    # of each matrix of which the optimizer keeps more than moments: the kinds of its state, and their shapes
    matrix_states: dict[str, dict[str, list[Count]]]

    def dump(self) -> str:
        """As JSON, with a checksum of its own content beside those of the other files."""
        values = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))
        return json.dumps({**values, "checksum": content_checksum(values)}, indent=1)

    @property
    def draw(self) -> Draw:
        """Of the operator in use."""
        return Draw(self.operator_seed or 0, self.merges_done)

    @property
    def tokenizer_files(self) -> list[str]:
        return [name for name in self.files if name.startswith(f"{TOKENIZER}/")]

    @property
    def tensor_files(self) -> list[str]:
        """All files but those of the tokenizer: without one of these the checkpoint cannot be used."""
        return [name for name in self.files if not name.startswith(f"{TOKENIZER}/")]

    @property
    def is_good(self) -> bool:
        """Whether a run can go back to it: not made amid steps with non-finite numbers, or after a loss spike."""
        return not (self.counters.get("bad_steps") or self.counters.get("trouble"))

    @property
    def matrices(self) -> str:
        """What trained the matrices: ``optim.matrices``."""
        name: str = self.config.get("optim", {}).get("matrices", "adamw")
        return name

    def kinds(self, name: str) -> tuple[str, ...]:
        """What a state file holds of a parameter that trains."""
        return ("master", *self.moments(name), *self._state(name))

    def moments(self, name: str) -> tuple[str, ...]:
        """The optimizer state with a value for each element of a parameter that trains."""
        return parameter_moments(name, self.matrices)

    def numel(self, name: str, kind: str = "master") -> int:
        """Elements of a trainable or frozen parameter, or of its tensor ``kind``."""
        shape = None if kind in ("master", "base") else self._state(name).get(kind)
        if shape is None:
            shape = self.parameters[name] if name in self.parameters else self.frozen[name]
        return math.prod(shape)

    def _state(self, name: str) -> dict[str, list[int]]:
        return self.matrix_states.get(name, {})


_MANIFEST = TypeAdapter(Manifest)


def content_checksum(values: dict[str, Any]) -> str:
    """xxh3-128 of JSON values, whatever their spacing and the order of keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(folder: Path) -> Manifest:
    """Reads a manifest.

    Raises :class:`CheckpointError` where it is missing, damaged, or of another version, and OSError where a network
    file system is gone.
    """
    path = folder / MANIFEST
    try:
        regular = stat.S_ISREG(path.lstat().st_mode)
        content = path.read_bytes() if regular else b""
    except OSError as error:
        raise_if_lost(error)
        model = next((name for name in _OF_MODELS if (folder / name).is_file()), None)
        if model is not None:
            raise CheckpointError(
                f"{folder}: holds a model ({model}) and not a checkpoint; give the run or the checkpoint that it was "
                "exported from"
            ) from error
        raise CheckpointError(
            f"{folder}: no checkpoint ({MANIFEST}: {error.strerror}); "
            "give a folder such as RUN/checkpoints/step-00001000"
        ) from error
    if not regular:
        raise CheckpointError(f"{path}: damaged, it is not a file of its own; use an older checkpoint")
    try:
        values = json.loads(content)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: not the manifest of a {FORMAT}; give a folder such as RUN/checkpoints/step-00001000"
            )
        version = values.get("version")
        if version != VERSION:  # first: another version may have another checksum
            raise CheckpointError(
                f"{path}: format version {version}, this program reads version {VERSION}; use the release that wrote it"
            )
        whole = values.pop("checksum", None) == content_checksum(values)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, it is not JSON ({error}); use an older checkpoint") from error
    if not whole:
        raise CheckpointError(f"{path}: damaged, its checksum is not that of its content; use an older checkpoint")
    return _checked(path, values)


def _checked(path: Path, values: dict[str, Any]) -> Manifest:
    del values["format"], values["version"]
    try:
        manifest = _MANIFEST.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: damaged, {where}: {first['msg']}; use an older checkpoint") from error
    if manifest.matrices not in list(MATRIX_OPTIMIZERS):
        raise CheckpointError(
            f"{path}: its matrices trained with {manifest.matrices!r}, and this program knows "
            f"{', '.join(MATRIX_OPTIMIZERS)}; use the release that wrote it"
        )
    return manifest


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
    """What is wrong with the first of these files that is missing, not a file, a link, of another size or altered.

    Raises OSError where a network file system is gone.
    """
    root = folder.resolve()
    for name in names:
        path = folder / name
        expected = manifest.files[name]
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name}: not a file"
            if path.resolve() != root / name:
                return f"{name}: a link, expected a file of the checkpoint's own"
            if status.st_size != expected.bytes:
                return f"{name}: {status.st_size} bytes, expected {expected.bytes}"
            if file_entry(path) != expected:
                return f"{name}: its checksum is not the one in {MANIFEST}"
        except OSError as error:
            raise_if_lost(error)
            return f"{name}: {error.strerror}"
    return None
