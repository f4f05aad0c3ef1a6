"""The tokenizer in a checkpoint: which files of a folder are copied, and what replaces them where they are damaged."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from relora_mora.checkpoint.layout import TOKENIZER, CheckpointError, Manifest, damage, read_manifest
from relora_mora.system.files import disk_faults_named
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.tokenizer.folder import TokenizerError
from relora_mora.tokenizer.identity import is_tokenizer

SUFFIXES = (".jinja", ".json", ".model", ".spm", ".txt")  # of data: no code, and no weights
MAX_BYTES = 2**28  # of a file: several times the largest vocabularies


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """Content of the files of a tokenizer's folder by their names in it, such as ``tokenizer.json``.

    Left out are files that are not data of a tokenizer (see ``SUFFIXES`` and ``MAX_BYTES``), links, what is in linked
    folders, and everything that is not a regular file. Raises OSError for a file that cannot be read.
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

    Where the checkpoint's own files are damaged it holds the run's tokenizer, with a warning, if that has the
    fingerprint in the manifest. Raises :class:`CheckpointError` where neither does. A :class:`TokenizerError` raised in
    the block names the folder that was copied.
    """
    manifest = read_manifest(checkpoint)
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as temporary:
        source = checkpoint / TOKENIZER
        copy = Path(temporary, "of-checkpoint")
        problem = damaged_tokenizer(checkpoint, manifest)
        if problem is None and not _copy(_listed(source, manifest), copy, manifest):
            problem = f"{TOKENIZER}: not the tokenizer it was made with"
        if problem is not None:
            # abspath, not resolve(): the checkpoint may be a link, and its run is the folder where the link is
            source = RunFolder(Path(os.path.abspath(checkpoint)).parent.parent).tokenizer  # noqa: PTH100
            copy = Path(temporary, "of-run")
            if not _copy(read_tokenizer(source), copy, manifest):
                path = manifest.config.get("tokenizer", {}).get("path")
                raise CheckpointError(
                    f"{checkpoint}: {problem}, and {source} is not the tokenizer it was made with; "
                    f"copy that one there (tokenizer.path was {path}), or use another checkpoint"
                )
            log.warning("%s: %s; the tokenizer in %s takes its place", checkpoint, problem, source)
        try:
            yield copy
        except TokenizerError as error:
            raise TokenizerError(str(error).replace(str(copy), str(source))) from error


def _listed(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The tokenizer files of a checkpoint, without those that its manifest does not list."""
    files = read_tokenizer(folder)
    return {name: content for name, content in files.items() if f"{TOKENIZER}/{name}" in manifest.files}


def _copy(files: Mapping[str, bytes], folder: Path, manifest: Manifest) -> bool:
    """Writes a tokenizer; whether it is the one with the fingerprint in the manifest."""
    with disk_faults_named(folder):
        write_tokenizer(files, folder)
    return is_tokenizer(folder, manifest.tokenizer_fingerprint)
