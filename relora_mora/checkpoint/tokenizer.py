"""The tokenizer in a checkpoint."""

from pathlib import Path

from relora_mora.checkpoint.layout import MANIFEST, TOKENIZER, CheckpointError, read_manifest


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The content of the files in a tokenizer's folder by relative path, such as ``tokenizer.json``."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def tokenizer_of(checkpoint: Path) -> Path:
    """The folder of the tokenizer that a checkpoint was saved with.

    Raises :class:`CheckpointError` if somebody has put files there that the manifest does not list, since they might
    change the tokens.
    """
    listed = read_manifest(checkpoint).files
    for path in sorted((checkpoint / TOKENIZER).rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if name not in listed and (path.is_symlink() or not path.is_dir()):
            raise CheckpointError(f"{checkpoint}: {MANIFEST} does not list {name!r}; move this file away")
    return checkpoint / TOKENIZER
