"""The tokenizer in a checkpoint: which files are copied, and what replaces them if they are damaged."""

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
from relora_mora.tokenizer.files import TokenizerError
from relora_mora.tokenizer.identity import is_tokenizer

SUFFIXES = (".jinja", ".json", ".model", ".spm", ".txt")  # only data: no code, no weights
MAX_BYTES = 2**28  # per file: several times the size of the largest vocabularies


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The content of the files in a tokenizer's folder by relative path, such as ``tokenizer.json``.

    Leaves out files that are not data of a tokenizer (see ``SUFFIXES`` and ``MAX_BYTES``), links, files in linked
    folders, and everything that is not a regular file. Raises OSError for a file that cannot be read.
    """
    files: dict[str, bytes] = {}
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            name = path.relative_to(folder).as_posix()
            status = path.lstat()
            is_data = path.suffix in SUFFIXES and stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES
            if is_data and name.isprintable():  # a manifest lists no other names
                files[name] = path.read_bytes()
    return dict(sorted(files.items()))


def write_tokenizer(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes files as :func:`read_tokenizer` returns them."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def damaged_tokenizer(folder: Path, manifest: Manifest) -> str | None:
    """The problem with the tokenizer files of a checkpoint; None if they match its manifest."""
    return damage(folder, manifest, manifest.tokenizer_files)


@contextlib.contextmanager
def tokenizer_of(checkpoint: Path) -> Iterator[Path]:
    """A temporary folder that contains only the tokenizer that a checkpoint was saved with.

    If the checkpoint's own files are damaged, it contains the run's tokenizer, provided that this has the fingerprint
    in the manifest, and a warning says so. Raises :class:`CheckpointError` if neither can be used. A
    :class:`TokenizerError` that is raised in the block names the folder that was copied.
    """
    manifest = read_manifest(checkpoint)
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as temporary:
        source = checkpoint / TOKENIZER
        copy = Path(temporary, "of-checkpoint")
        problem = damaged_tokenizer(checkpoint, manifest)
        files = read_tokenizer(source) if problem is None else {}
        listed = {name: content for name, content in files.items() if f"{TOKENIZER}/{name}" in manifest.files}
        if problem is None and not _copy(listed, copy, manifest):
            problem = f"{TOKENIZER}: not the tokenizer that it was saved with"
        if problem is not None:
            # abspath, not resolve(): if the checkpoint is a link, its run is the folder that contains the link
            source = RunFolder(Path(os.path.abspath(checkpoint)).parent.parent).tokenizer  # noqa: PTH100
            copy = Path(temporary, "of-run")
            if not _copy(read_tokenizer(source), copy, manifest):
                path = manifest.config.get("tokenizer", {}).get("path")
                raise CheckpointError(
                    f"{checkpoint}: {problem}, and {source} is not the tokenizer that it was saved with; "
                    f"copy that tokenizer there (tokenizer.path was {path}), or use another checkpoint"
                )
            log.warning("%s: %s; using the tokenizer in %s instead", checkpoint, problem, source)
        try:
            yield copy
        except TokenizerError as error:
            raise TokenizerError(str(error).replace(str(copy), str(source))) from error


def _copy(files: Mapping[str, bytes], folder: Path, manifest: Manifest) -> bool:
    """Writes a tokenizer and returns whether it has the fingerprint in the manifest."""
    with disk_faults_named(folder):
        write_tokenizer(files, folder)
    return is_tokenizer(folder, manifest.tokenizer_fingerprint)
