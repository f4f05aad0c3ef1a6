"""Finds the files of a named set: ``OWNER/NAME`` on the hub or a local folder, with a configuration and a split.

One process of a run looks up the files and sends the answer to the others (``remember_datasets``). ``datasets`` gets a
copy of the folder in which every file is empty except those that describe the set. So it makes no requests and reads no
text: the answer depends only on the names, and a set on the hub is resolved like one on a disk.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.files import open_file
from relora_mora.data.shard import Shard, format_of
from relora_mora.data.sources.names import SPLITS, Commits, DatasetName, dataset_name, hub_shard

Key = tuple[DatasetName, str, str]  # split and commit
Found = tuple[str, ...] | SourceError
Datasets = dict[Key, Found]
_MAX_FILES = 200_000
_remembered: Datasets = {}


def dataset_files(name: DatasetName, split: str, commits: Commits) -> tuple[str, ...]:
    """The files of the split that the source names, or of ``split`` if it names none.

    Paths are relative to the repository or folder. Raises SourceError.
    """
    files = _remembered.get(_key(name, split, commits)) or _find(name, split, commits)
    if isinstance(files, SourceError):
        raise files
    return files


def find_datasets(config: DataConfig) -> Datasets:
    """The files of each set that the settings name, or the error. Only one rank calls this, for all ranks."""
    commits = Commits.of(config)
    found: Datasets = {}
    for split in SPLITS:
        for source in config.sources(split):
            name = dataset_name(source)
            if name is not None:
                found[_key(name, split, commits)] = _find(name, split, commits)
    return found


def remember_datasets(found: Datasets) -> None:
    """Makes this process use these answers from now on instead of looking up the files of sets."""
    _remembered.clear()
    _remembered.update(found)


def _key(name: DatasetName, split: str, commits: Commits) -> Key:
    return name, name.split or split, commits.at(name.place, name.revision) if name.on_hub else ""


def _find(name: DatasetName, split: str, commits: Commits) -> Found:
    """The files, or an error. The error is raised when sources are resolved, to be reported with all other faults."""
    try:
        if name.on_hub:
            from relora_mora.data.hub import list_files  # late: its libraries take long to load

            paths = list_files(name.place, commits.at(name.place, name.revision), commits.timeout_seconds)
        else:
            paths = _files_below(name)
        if not name.data_files and any(files <= set(paths) for files in _SAVED):
            raise SourceError(
                f"{name.source} was written by save_to_disk, whose folders are not read as sets; write it as "
                "Parquet (datasets.load_from_disk, then to_parquet), or give its local files by path, such as "
                f"{name.place}/*.arrow"
            )
        cards = {card: _read_card(name, commits, card) for card in CARDS if card in paths}
        return tuple(split_files(name, split, paths, cards))
    except SourceError as error:
        return error


def _files_below(name: DatasetName) -> list[str]:
    """All files in a folder and its subfolders, except hidden ones, as paths relative to the folder."""

    def refuse(error: OSError) -> None:
        raise unreadable(str(error.filename), error, "check the path and its permissions")

    paths: list[str] = []
    for parent, folders, files in os.walk(name.folder, onerror=refuse, followlinks=True):
        folders[:] = [folder for folder in folders if not folder.startswith((".", "__"))]
        paths += [(Path(parent) / file).relative_to(name.folder).as_posix() for file in files]
        if len(paths) > _MAX_FILES:
            raise SourceError(
                f"{name.source} is a folder with more than {_MAX_FILES:,} files; "
                f"give a pattern for the files to read, e.g. {name.place}/*.parquet"
            )
    return paths


def _read_card(name: DatasetName, commits: Commits, path: str) -> str:
    """The text of a small file of the set."""
    shard = Shard(str(name.folder / path), str(name.folder / path))
    if name.on_hub:
        shard = hub_shard(name.place, commits.at(name.place, name.revision), path)
    with contextlib.closing(open_file(shard, commits.timeout_seconds)) as file:
        try:
            return file.read().decode()
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{shard.name} describes the set, but is not UTF-8; fix it, or give the files by path"
            ) from error


CARDS = ("README.md", ".huggingface.yaml")  # the files that describe a set, besides the names of its files
_SAVED = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})  # in folders of save_to_disk
# in names that datasets ignores: line breaks, its own separator, and capitals in a suffix
_ODD = re.compile(r"\n|::|\.[^/.]*[A-Z][^/.]*(\.(gz|zstd?))?$")


def split_files(name: DatasetName, split: str, paths: Collection[str], cards: Mapping[str, str]) -> list[str]:
    """The sorted files of the split that ``name`` names, or of ``split`` if it names none.

    ``paths`` are all files of the set, and ``cards`` are the contents of ``CARDS``. Raises SourceError for a
    configuration or split that does not exist, listing those that do, and for files of several formats, from which
    ``datasets`` would silently choose one.
    """
    source = name.source
    split = name.split or split
    script = f"{PurePosixPath(name.place).name if name.on_hub else name.folder.resolve().name}.py"
    with tempfile.TemporaryDirectory() as folder, _torch_not_halted():
        root = Path(folder) / "set"
        for path in paths:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise SourceError(f"{source}: {path!r} does not name a file inside of it; give the files by path")
            if path == script:
                raise SourceError(
                    f"{source} is a script ({path}), which datasets no longer runs; give the files by path"
                )
            if not name.data_files and format_of(path) and _ODD.search(path):
                raise SourceError(
                    f"{source}: datasets leaves out files with names such as {path!r}; rename them, or give a pattern "
                    "for the files to read"
                )
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
        for path, text in cards.items():
            (root / path).write_text(text, encoding="utf-8")
        _refuse_unmatched(name, root)
        splits = _splits(name, split, root)
        if splits is None:
            raise SourceError(f"{source} holds no text files; check its content, or give its files by path")
        if split not in splits:
            raise missing_split(name, split, splits)
        _refuse_mixed(name, split, root, splits)
        return splits[split]


@contextlib.contextmanager
def _torch_not_halted() -> Iterator[None]:
    """Hides a halted import of torch (None in ``sys.modules``), which ``datasets`` would take for an imported torch."""
    halted = sys.modules.get("torch", sys) is None
    if halted:
        del sys.modules["torch"]
    try:
        yield
    finally:
        if halted:
            sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def missing_split(name: DatasetName, split: str, splits: Iterable[str]) -> SourceError:
    existing = list(splits)
    return SourceError(
        f"{name.source} has no split {split}; its splits are {', '.join(existing)}: "
        f"name one as {name.place}:{name.config or ''}:{''.join(existing[:1])}"
    )


def _refuse_unmatched(name: DatasetName, root: Path) -> None:
    """Raises SourceError for a pattern of ``data_files`` without a match, which ``datasets`` would silently ignore."""
    from datasets.data_files import resolve_pattern

    for pattern in name.data_files:
        if "://" in pattern:
            raise SourceError(f"{name.source}: {pattern!r} in data_files is a url; name files inside of the set")
        try:
            resolve_pattern(pattern, str(root))
        except FileNotFoundError as error:
            raise SourceError(f"{name.source} holds no files {pattern}; check data_files") from error
        except Exception as error:  # of many types, e.g. for a ** next to other letters
            raise SourceError(
                f"{name.source}: {pattern!r} in data_files is not a valid pattern ({error}); correct it"
            ) from error


def _splits(name: DatasetName, split: str, root: Path) -> dict[str, list[str]] | None:
    """The files of each split, sorted and relative to the root; None if there are none."""
    import datasets

    files = {split: list(name.data_files)} if name.data_files else None
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(
            str(root), name.config, data_files=files, cache_dir=str(root.parent / "cache")
        )
    except FileNotFoundError:
        return None
    except Exception as error:  # of many types, since anybody may have written the README
        raise _config_error(name, root, error) from error
    home = root.resolve()
    splits: dict[str, list[str]] = {}
    for part, paths in (builder.config.data_files or {}).items():
        resolved = [Path(path).resolve() for path in paths]
        if not all(file.is_relative_to(home) for file in resolved):
            raise SourceError(f"{name.source}: its README names files outside of it; give the files by path")
        if resolved:
            splits[str(part)] = sorted(file.relative_to(home).as_posix() for file in resolved)
    return splits or None


def _config_error(name: DatasetName, root: Path, error: Exception) -> SourceError:
    """The error to raise for one of ``datasets``. It lists the configurations if the named one is missing or wrong."""
    import datasets

    source = name.source
    config = name.config
    try:
        configs = datasets.get_dataset_config_names(str(root))
    except Exception:  # of many types, too; the set is wrong then, not the name
        configs = []
    if config in configs or len(configs) < (2 if config is None else 1):
        message = " ".join(str(error).split()).replace(str(root), source)
        return SourceError(f"{source}: datasets cannot find its files ({message:.500}); give the files by path")
    return SourceError(
        f"{source}: it has {f'no configuration {config}, only' if config else 'several configurations:'} "
        f"{', '.join(configs)}; name one as {name.place}:{configs[0]}"
    )


def _refuse_mixed(name: DatasetName, split: str, root: Path, splits: Mapping[str, list[str]]) -> None:
    """Raises SourceError if ``datasets`` finds other files after those that it took are removed."""
    taken = [path for files in splits.values() for path in files]
    for path in taken:
        (root / path).unlink(missing_ok=True)
    try:
        others = _splits(name, split, root)
    except SourceError:
        return
    if others:
        first = next(path for files in others.values() for path in files)
        raise SourceError(
            f"{name.source}: datasets would read files such as {taken[0]}, but leave out files such as "
            f"{first!r}; give a pattern for the files to read"
        )
