"""Sets of text by name: ``OWNER/NAME`` on the hub or a local folder, with a configuration and a split.

What is in a set is asked for in one process of a run, and handed to the others (``remember_datasets``).
"""

from __future__ import annotations

import os
from pathlib import Path

from relora_mora.config import DataConfig
from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.hub_sources import SPLITS, Commits, DatasetName, dataset_name

Key = tuple[DatasetName, str, str]  # split and commit
Found = tuple[str, ...] | SourceError
Datasets = dict[Key, Found]
_MOST_FILES = 200_000
_remembered: Datasets = {}


def dataset_files(name: DatasetName, split: str, commits: Commits) -> tuple[str, ...]:
    """The files of the split that the source names, else of ``split``, relative to the repository or folder.

    Raises SourceError.
    """
    found = _remembered.get(_key(name, split, commits)) or _find(name, split, commits)
    if isinstance(found, SourceError):
        raise found
    return found


def find_datasets(config: DataConfig) -> Datasets:
    """What is in each set that the settings name, or why that cannot be told. For one rank, which asks for all."""
    commits = Commits.of(config)
    found: Datasets = {}
    for split in SPLITS:
        for source in config.sources(split):
            name = dataset_name(source)
            if name is not None:
                found[_key(name, split, commits)] = _find(name, split, commits)
    return found


def remember_datasets(found: Datasets) -> None:
    """From now on this process takes these for what is in the sets, and asks no more."""
    _remembered.clear()
    _remembered.update(found)


def _key(name: DatasetName, split: str, commits: Commits) -> Key:
    return name, name.split or split, commits.at(name.place, name.revision) if name.on_hub else ""


def _find(name: DatasetName, split: str, commits: Commits) -> Found:
    """The files, or the error to raise where the sources are resolved, so that it is told with all other faults."""
    from relora_mora.data.datasets_folder import CARDS, split_files
    from relora_mora.data.saved_sets import saved_files

    try:
        if name.on_hub:
            from relora_mora.data.hub import list_files, read_text  # here: its libraries take long to load

            commit = commits.at(name.place, name.revision)
            sizes = list_files(name.place, commit, commits.timeout_seconds)
            paths = list(sizes)

            def read(path: str) -> str:
                return read_text(name.place, commit, path, sizes[path], commits.timeout_seconds)

        else:
            paths = _files_below(name)

            def read(path: str) -> str:
                return _read_card(name.folder / path)

        saved = None if name.config or name.data_files else saved_files(name, split, set(paths), read)
        if saved is not None:
            return tuple(saved)
        cards = {card: read(card) for card in CARDS if card in paths}
        return tuple(split_files(name, split, paths, cards))
    except SourceError as error:
        return error


def _files_below(name: DatasetName) -> list[str]:
    """All files in a folder and in those below it, relative to it, but the hidden ones."""

    def refuse(error: OSError) -> None:
        raise unreadable(str(error.filename), error, "check the path and its permissions")

    paths: list[str] = []
    for parent, folders, files in os.walk(name.folder, onerror=refuse, followlinks=True):
        folders[:] = [folder for folder in folders if not folder.startswith((".", "__"))]
        paths += [(Path(parent) / file).relative_to(name.folder).as_posix() for file in files]
        if len(paths) > _MOST_FILES:
            raise SourceError(
                f"{name.source} is a folder of more than {_MOST_FILES:,} files; "
                f"give those to read, e.g. {name.place}/*.parquet"
            )
    return paths


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(str(path), error, "check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path} is not UTF-8, and it describes the set; mend it, or give the files by path"
        ) from error
