"""What ``datasets`` makes of the names in a folder: configurations, splits and their files.

It is given a copy of the folder in which every file is empty but those that describe the set, so it makes no requests
and reads no text: what comes out depends on the names alone, and a set on the hub is resolved like one on a disk.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from relora_mora.data.errors import SourceError
from relora_mora.data.formats import format_of
from relora_mora.data.hub_sources import DatasetName

CARDS = ("README.md", ".huggingface.yaml")  # what describes a set, beside the names of its files
_ODD = re.compile(r"\n|::")


def split_files(name: DatasetName, split: str, paths: Collection[str], cards: Mapping[str, str]) -> list[str]:
    """The files of the split that is named, else of ``split``, sorted, of the set that has these ``paths`` and cards.

    ``cards`` are the contents of ``CARDS``. Raises SourceError with what there is for a configuration or split that
    there is not, and for files of several formats, of which ``datasets`` would silently take one.
    """
    source = name.source
    split = name.split or split
    script = f"{PurePosixPath(name.place).name if name.on_hub else name.folder.resolve().name}.py"
    with tempfile.TemporaryDirectory() as folder, _torch_not_halted():
        root = Path(folder) / "set"
        for path in paths:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise SourceError(f"{source}: {path!r} is no name of a file inside of it; give the files by path")
            if path == script:
                raise SourceError(f"{source}: is a script, {path}, which datasets runs no more; give its files by path")
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
        for path, text in cards.items():
            (root / path).write_text(text, encoding="utf-8")
        _refuse_unmatched(name, root)
        splits = _splits(name, split, root)
        if splits is None:
            raise SourceError(f"{source} holds no files of text; check what is in it, or give its files by path")
        if split not in splits:
            raise missing_split(name, split, splits)
        _refuse_mixed(name, split, root, splits, paths)
        return splits[split]


@contextlib.contextmanager
def _torch_not_halted() -> Iterator[None]:
    """``datasets`` takes torch for imported where a command has halted its import (None in ``sys.modules``)."""
    halted = sys.modules.get("torch", sys) is None
    if halted:
        del sys.modules["torch"]
    try:
        yield
    finally:
        if halted:
            sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def missing_split(name: DatasetName, split: str, splits: Iterable[str]) -> SourceError:
    there = list(splits)
    return SourceError(
        f"{name.source} has no split {split}, but {', '.join(there)}; "
        f"name one as {name.place}:{name.config or ''}:{''.join(there[:1])}"
    )


def _refuse_unmatched(name: DatasetName, root: Path) -> None:
    """Raises SourceError for a pattern of ``data_files`` that finds nothing: ``datasets`` passes over it in silence."""
    from datasets.data_files import resolve_pattern

    for pattern in name.data_files:
        if "://" in pattern:
            raise SourceError(f"{name.source}: {pattern!r} in data_files is no name of files inside of it; name those")
        try:
            resolve_pattern(pattern, str(root))
        except FileNotFoundError as error:
            raise SourceError(f"{name.source} holds no files {pattern}; check data_files") from error
        except Exception as error:  # of many kinds, as of a ** beside other letters
            raise SourceError(
                f"{name.source}: {pattern!r} in data_files is no pattern ({error}); correct it"
            ) from error


def _splits(name: DatasetName, split: str, root: Path) -> dict[str, list[str]] | None:
    """The files of each split, sorted and relative to the root; None where there are none at all."""
    import datasets

    files = {split: list(name.data_files)} if name.data_files else None

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(
            str(root), name.config, data_files=files, cache_dir=str(root.parent / "cache")
        )
    except FileNotFoundError:
        return None
    except Exception as error:  # of many kinds, since the README is anybody's
        raise _refused(name, root, error) from error
    home = root.resolve()
    splits: dict[str, list[str]] = {}
    for part, paths in (builder.config.data_files or {}).items():
        found = [Path(path).resolve() for path in paths]
        outside = [file for file in found if not file.is_relative_to(home)]
        if outside:
            raise SourceError(f"{name.source}: its README names files outside of it; give the files by path")
        if found:
            splits[str(part)] = sorted(file.relative_to(home).as_posix() for file in found)
    return splits or None


def _refused(name: DatasetName, root: Path, error: Exception) -> SourceError:
    """With the configurations there are, where it is the name of one that is missing or wrong."""
    import datasets

    source = name.source
    config = name.config
    try:
        configs = datasets.get_dataset_config_names(str(root))
    except Exception:  # as before: then the set is wrong and not the name
        configs = []
    if config in configs or len(configs) < (2 if config is None else 1):
        said = " ".join(str(error).split()).replace(str(root), source)
        return SourceError(f"{source}: datasets cannot tell its files ({said:.500}); give them by path")
    return SourceError(
        f"{source}: it has {f'no configuration {config}' if config else 'several configurations'}, "
        f"but {', '.join(configs)}; name one as {name.place}:{configs[0]}"
    )


def _plain(path: str, *, lower: bool) -> str:
    file = PurePosixPath(_ODD.sub("_", path))
    return file.with_name(file.name.lower() if lower else file.name).as_posix()


def _refuse_mixed(
    name: DatasetName, split: str, root: Path, splits: Mapping[str, list[str]], paths: Collection[str]
) -> None:
    """Raises SourceError if others are found in place of the files that were found.

    ``datasets`` passes over names with a line break or ``::`` and over suffixes in capitals, so these are renamed here.
    """
    taken = [path for files in splits.values() for path in files]
    for path in taken:
        (root / path).unlink(missing_ok=True)
    renamed = {}
    for path in set(paths).difference(taken):
        plain = _plain(path, lower=not name.data_files)
        if plain != path and format_of(path):
            (root / plain).parent.mkdir(parents=True, exist_ok=True)
            (root / path).rename(root / plain)
            renamed[plain] = path
    try:
        others = _splits(name, split, root)
    except SourceError:
        return
    if others:
        first = next(path for files in others.values() for path in files)
        raise SourceError(
            f"{name.source}: datasets would read {taken[0]} and the like, and leave out {renamed.get(first, first)!r} "
            "and the like; give the files to read by a pattern"
        )
