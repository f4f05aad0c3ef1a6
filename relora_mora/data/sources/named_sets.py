"""The files of named sets of text, found by ``datasets`` from their names and their READMEs alone."""

import contextlib
import glob
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.files import open_file
from relora_mora.data.shard import format_of
from relora_mora.data.sources.names import SetName, commit_of, hub_shard, sets_on_hub

log = logging.getLogger(__name__)

CARDS = ("README.md", ".huggingface.yaml")  # the files that describe a set, besides the names of its files
Found = tuple[str, ...] | SourceError
_found: dict[tuple[SetName, str], Found] = {}  # by name and commit


def find_files(config: DataConfig) -> None:
    """Asks for the files of each set on the hub. From now on, this process uses the answers, errors too."""
    keys = {(name, commit_of(name, config)) for name in sets_on_hub(config) if _must_be_listed(name)}
    _found.clear()
    _found.update({key: _find(*key, config.timeout_seconds) for key in keys})


def _must_be_listed(name: SetName) -> bool:
    """Whether only the hub knows which files are named. Ranges such as {00..15} are known without it."""
    return not name.patterns or any(glob.has_magic(pattern) for pattern in name.patterns)


def hub_files(name: SetName, commit: str, timeout_seconds: float) -> Sequence[str]:
    """The files of a set on the hub. Raises SourceError."""
    if not _must_be_listed(name):
        return name.patterns
    found = _found.get((name, commit)) or _find(name, commit, timeout_seconds)
    if isinstance(found, SourceError):
        raise found
    return found


def _find(name: SetName, commit: str, timeout_seconds: float) -> Found:
    """The files, or an error, which is raised when sources are resolved, to be reported with all other faults.

    The set is laid out as a folder of empty files. So a set on the hub is resolved like one on a disk, and a network
    fault is never taken for an answer.
    """
    from relora_mora.data.hub import list_files  # late: its libraries take long to load

    try:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, PurePosixPath(name.place).name)
            for path in list_files(name.place, commit, timeout_seconds):
                if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                    raise SourceError(f"{name.source}: {path!r} does not name a file inside of it")
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).touch()
                if path in CARDS:
                    with contextlib.closing(open_file(hub_shard(name.place, commit, path), timeout_seconds)) as card:
                        (root / path).write_bytes(card.read())
            if not name.patterns:
                return tuple(split_files(name, root))
            return tuple(file for pattern in name.patterns for file in _matching(name, root, pattern))
    except SourceError as error:
        return error


def _matching(name: SetName, root: Path, pattern: str) -> list[str]:
    try:
        files = sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise SourceError(f"{name.source}: {pattern} is not a pattern of files inside of the set ({error})") from error
    if files:
        return files
    raise SourceError(f"{name.source}: {name.place} holds no files {pattern}; check the pattern")


def split_files(name: SetName, root: Path) -> list[str]:
    """The files of the split that ``datasets`` would load from a folder, sorted and relative to it.

    Raises SourceError for a configuration or split that does not exist, listing those that do. Warns of files next to
    them which ``datasets`` leaves out, as it does with those of another format than most.
    """
    source = name.source
    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():
        raise SourceError(
            f"{source} was written by save_to_disk, whose folders are not read as sets; write it as Parquet "
            f"(datasets.load_from_disk, then to_parquet), or give its files by path, such as {name.place}/*.arrow"
        )
    splits = _splits(name, root)
    if not splits:
        raise SourceError(f"{source} holds no text files; check its content, or give its files by path")
    if name.split not in splits:
        raise SourceError(
            f"{source} has no split {name.split}; its splits are {', '.join(splits)}: "
            f"name one as {name.place}:{name.config or ''}:{next(iter(splits))}"
        )
    files = [Path(path).resolve() for path in splits[name.split]]
    home = root.resolve()
    if not all(file.is_relative_to(home) for file in files):
        raise SourceError(f"{source}: its README names files outside of it; give the files by path")
    taken = {Path(path).name for paths in splits.values() for path in paths}
    others = [path.name for path in files[0].parent.iterdir() if format_of(path.name) and path.name not in taken]
    if others and name.config is None:
        log.warning("%s: datasets leaves out %s; name files to read with data_files", source, sorted(others)[0])
    return sorted(file.relative_to(home).as_posix() for file in files)


def _splits(name: SetName, root: Path) -> Mapping[str, Sequence[str]]:
    """The files of each split; none if there is no text."""
    halted = sys.modules.get("torch", sys) is None  # datasets would take a halted import for an imported torch
    if halted:
        del sys.modules["torch"]
    import datasets

    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            builder = datasets.load_dataset_builder(str(root), name.config, cache_dir=cache)
        return {str(split): paths for split, paths in (builder.config.data_files or {}).items() if paths}
    except FileNotFoundError:
        return {}
    except Exception as error:  # of many types, since anybody may have written the README
        message = " ".join(str(error).split()).replace(str(root), name.source)
        raise SourceError(
            f"{name.source}: datasets cannot find its files ({message:.500}); "
            f"name a configuration as {name.place}:CONFIG, or give the files by path"
        ) from error
    finally:
        if halted:
            sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
