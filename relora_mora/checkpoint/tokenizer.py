"""The tokenizer beside a checkpoint's tensors: what is copied of a folder, and which one stands in where it is damaged."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from relora_mora.checkpoint.layout import TOKENIZER, CheckpointError, Manifest, damage, read_manifest
from relora_mora.system.logs import log
from relora_mora.tokenizer import TokenizerError, is_tokenizer

SUFFIXES = (".jinja", ".json", ".model", ".spm", ".txt")  # of data: no code, and no weights
MAX_BYTES = 2**28  # of a file: several times the largest vocabularies


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """Content of the files of a tokenizer's folder by their names in it, such as ``tokenizer.json``.

    What is no data of a tokenizer (see ``SUFFIXES`` and ``MAX_BYTES``), no regular file, a link or in a linked folder is
    left out. Raises OSError for a file that cannot be read.
    """
    found: dict[str, bytes] = {}
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            name = path.relative_to(folder).as_posix()
            status = path.lstat()
            data = path.suffix in SUFFIXES and stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES
            if data and name.isprintable():  # a manifest lists no other names
                found[name] = path.read_bytes()
    return dict(sorted(found.items()))


def write_tokenizer(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes what :func:`read_tokenizer` has read."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def damaged_tokenizer(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with the tokenizer files of a checkpoint, None when they are as its manifest says."""
    return damage(folder, manifest, manifest.tokenizer_files)


@contextlib.contextmanager
def tokenizer_of(checkpoint: Path) -> Iterator[Path]:
    """A folder, for as long as the block lasts, with nothing but the tokenizer that a checkpoint was made with.

    Where the checkpoint's own files are damaged it is the run's, with a warning, if that one has the fingerprint in the
    manifest. Raises :class:`CheckpointError` where neither does; a :class:`TokenizerError` of the block names that folder.
    """
    manifest = read_manifest(checkpoint)
    of_run = Path(os.path.abspath(checkpoint)).parent.parent / TOKENIZER  # noqa: PTH100 - the checkpoint may be a link
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as temporary:
        place, copy = checkpoint / TOKENIZER, Path(temporary, "of-checkpoint")
        problem = damaged_tokenizer(checkpoint, manifest)
        if problem is None:
            listed = {
                name: text for name, text in read_tokenizer(place).items() if f"{TOKENIZER}/{name}" in manifest.files
            }
            if not _is_copied(listed, copy, manifest):
                problem = f"{TOKENIZER}: not the tokenizer it was made with"
        if problem is not None:
            place, copy = of_run, Path(temporary, "of-run")
            if not _is_copied(read_tokenizer(of_run), copy, manifest):
                raise CheckpointError(
                    f"{checkpoint}: {problem}, and {of_run} is not the tokenizer it was made with; copy that one there "
                    f"(tokenizer.path was {manifest.config.get('tokenizer', {}).get('path')}), or use another checkpoint"
                )
            log.warning("%s: %s; the tokenizer in %s takes its place", checkpoint, problem, of_run)
        try:
            yield copy
        except TokenizerError as error:
            raise TokenizerError(str(error).replace(str(copy), str(place))) from error


def _is_copied(files: Mapping[str, bytes], folder: Path, manifest: Manifest) -> bool:
    write_tokenizer(files, folder)
    return is_tokenizer(folder, manifest.tokenizer_fingerprint)
