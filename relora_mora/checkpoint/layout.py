"""The layout of a checkpoint on disk, and the rules for when it counts.

::

    checkpoints/
      latest                                   the name of the newest checkpoint, replaced by rename
      best                                     the name of the best one, if checkpoint.keep_best names a metric
      step-00000200/
        manifest.json                          written last: step, settings, data state, size and checksum of every file
        state-00000-of-00002.safetensors       the masters, moments and matrix states that rank 0 owned, float32; codes
                                               of 8-bit moments have 8 bits
        base-00000-of-00002.safetensors        the frozen weights that rank 0 owned, float32
        tokenizer/...                          loaded by AutoTokenizer

A folder ``*.tmp`` is being written or removed and does not count. A checkpoint is never replaced: one that does not
belong to the history of the run any more is renamed to ``abandoned-step-N``, and no run takes it by itself.

A tensor in a state file is a piece of one parameter. Its key is ``kind|name|start``: master, exp_avg, exp_avg_sq or
momentum, the parameter's name, and the index of the first element in the flattened parameter. The state that an
optimizer keeps for a whole matrix (``matrix_states`` in the manifest) has other kinds, and is never cut. A reader
combines the pieces for any world size and ZeRO stage. Checkpoints share base files by hard links until a merge changes
the base. Nothing is pickled.
"""

import hashlib
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

from relora_mora.config.registry import MATRIX_OPTIMIZERS, optimizer_named, optimizer_of
from relora_mora.optim.groups import group_of
from relora_mora.system.files import raise_if_lost, remove
from relora_mora.system.logs import log

FORMAT = "relora_mora checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
TOKENIZER = "tokenizer"
TEMPORARY = ".tmp"


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message says what was found, what was expected, and what to do."""


def damaged(place: Path | str, problem: str) -> CheckpointError:
    """The error for a part of a checkpoint that is not as it was written."""
    return CheckpointError(f"{place}: damaged, {problem}; use an older checkpoint")


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint folder; None for other names."""
    match = re.fullmatch(r"step-([0-9]{8,15})", folder.name)
    return int(match[1]) if match and folder.name == step_folder(int(match[1])) else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders in ``checkpoints/`` with the name of a checkpoint, damaged or not, newest first."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if path.is_dir() and (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def best_step(folder: Path) -> int | None:
    """The step that the file ``best`` in ``checkpoints/`` names."""
    try:
        return step_of(Path((folder / BEST).read_text(encoding="utf-8").strip()))
    except (OSError, UnicodeError):
        return None


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint. If this is interrupted, nothing that is left looks like a checkpoint."""
    aside = checkpoint.with_name(f"{checkpoint.name}.old{TEMPORARY}")
    remove(aside)
    checkpoint.rename(aside)
    remove(aside)


def abandon(path: Path) -> None:
    """Renames a checkpoint, or another file or folder of a run, to ``abandoned-NAME`` or ``abandoned-2-NAME``, ..."""
    target = path.with_name(f"abandoned-{path.name}")
    number = 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"abandoned-{number}-{path.name}")
    path.rename(target)
    log.warning("%s is not continued here: renamed to %s", path.name, target.name)


def _inside(name: str) -> str:
    if not name.isprintable() or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("not a path inside the checkpoint")
    return name


Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]  # also exact as a float


@dataclass(frozen=True)
class FileEntry:
    """The manifest's entry for one file of a checkpoint."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    bytes: Count
    xxh3_128: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


@dataclass(frozen=True)
class Manifest:
    """Everything in a checkpoint except its tensors."""

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
    data_order: str  # fingerprint of what the positions in data_state depend on
    data_state: dict[str, Any]
    counters: dict[str, Any]  # counts of the run so far: tokens, skipped steps, ...
    files: dict[Annotated[str, AfterValidator(_inside)], FileEntry]
    data_content: str  # fingerprint of the text of the training data
    eos_token_id: Count  # ends a document; not part of the fingerprint of a Hugging Face tokenizer
    # kinds and shapes of the state of each matrix for which the optimizer keeps more than moments
    matrix_states: dict[str, dict[str, list[Count]]]

    def dump(self) -> str:
        """As JSON, with a checksum of the manifest itself."""
        values = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))
        return json.dumps({**values, "checksum": content_checksum(values)}, indent=1)

    @property
    def optimizers(self) -> dict[str, str]:
        """The values of ``optim.matrices`` and ``optim.others``."""
        saved = self.config.get("optim", {})
        return {setting: saved.get(setting, "adamw") for setting in ("matrices", "others")}

    @property
    def is_good(self) -> bool:
        """Whether a run can go back to it: it was not saved amid steps with numbers that are not finite."""
        return not (self.counters.get("bad_steps") or self.counters.get("trouble"))

    def kinds(self, name: str) -> tuple[str, ...]:
        """The kinds of tensors in a state file for a trainable parameter."""
        return ("master", *self.moments(name), *self.matrix_states.get(name, {}))

    def moments(self, name: str) -> tuple[str, ...]:
        """The kinds of optimizer state that have a value for each element of a trainable parameter."""
        return optimizer_of(group_of(name, self.parameters[name]), **self.optimizers).moments

    def numel(self, name: str, kind: str = "master") -> int:
        """The number of elements of a trainable or frozen parameter, or of its tensor ``kind``."""
        shape = None if kind in ("master", "base") else self.matrix_states.get(name, {}).get(kind)
        if shape is None:
            shape = self.parameters[name] if name in self.parameters else self.frozen[name]
        return math.prod(shape)


_MANIFEST = TypeAdapter(Manifest)


def content_checksum(values: dict[str, Any]) -> str:
    """xxh3-128 of JSON values; spacing and the order of keys do not matter."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(folder: Path) -> Manifest:
    """Reads a manifest.

    Raises :class:`CheckpointError` if it is missing, damaged, or of another version, and OSError if a network file
    system is gone.
    """
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise damaged(path, "it is not a regular file")
        return parse_manifest(path, path.read_bytes())
    except OSError as error:
        raise_if_lost(error)
        raise CheckpointError(
            f"{folder}: not a checkpoint ({MANIFEST}: {error.strerror}); "
            "give a folder such as RUN/checkpoints/step-00001000"
        ) from error


def parse_manifest(path: Path | str, content: bytes) -> Manifest:
    """A manifest from the content of its file; ``path`` is for messages. Raises :class:`CheckpointError`."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise damaged(path, f"or not the manifest of a {FORMAT}")
    if values.get("version") != VERSION:  # checked first: another version may compute the checksum differently
        found = f"format version {values.get('version')}, expected version {VERSION}"
        raise CheckpointError(f"{path}: {found}; use the release that wrote it")
    if values.pop("checksum", None) != content_checksum(values):
        raise damaged(path, "its checksum does not match its content")
    del values["format"], values["version"]
    for unused in ("operator_seed", "data_fingerprint"):  # earlier releases wrote them
        values.pop(unused, None)
    try:
        manifest = _MANIFEST.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise damaged(path, f"{field}: {first['msg']}") from error
    if "on_spike" in manifest.config.get("train", {}):  # which no later release writes
        raise CheckpointError(f"{path}: of release 0.2; use that release, or begin with what it exports")
    for setting, name in manifest.optimizers.items():
        if not isinstance(name, str) or optimizer_named(name) is None:
            known = ", ".join(MATRIX_OPTIMIZERS)
            fault = f"trained with optim.{setting}={name!r}, but this program only knows {known}"
            raise CheckpointError(f"{path}: {fault}; use the release that wrote it")
    return manifest


def good_step(folder: Path) -> int | None:
    """The step of a checkpoint if a run can go back to it; None if it cannot, or if the checkpoint is damaged."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return None
    return manifest.step if manifest.is_good else None


def file_entry(path: Path) -> FileEntry:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, xxhash.xxh3_128)
        return FileEntry(stream.tell(), digest.hexdigest())


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raises :class:`CheckpointError` unless these files are regular files of the checkpoint, and as listed.

    Raises OSError if a network file system is gone.
    """
    root = folder.resolve()
    for name in names:
        path = folder / name
        try:
            is_own_file = stat.S_ISREG(path.stat().st_mode) and path.resolve() == root / name
            problem = None if is_own_file else "a link or not a regular file"
            if problem is None and file_entry(path) != manifest.files[name]:
                problem = f"its size or checksum is not the one in {MANIFEST}"
        except OSError as error:
            raise_if_lost(error)
            problem = error.strerror
        if problem is not None:
            raise damaged(path, problem)
